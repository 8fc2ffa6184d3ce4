"""A request's path, in reading order: sequence, batch, scheduler, sampler, engine, llm."""
