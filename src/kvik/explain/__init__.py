"""A traced run of the user's model, and what is made of it: a page to look at, and a trace for Perfetto.

Read in this order: `tracing_ops` sees what each op computes, `tracer` does that for an engine's steps, `run` has one
prompt answered with the cache and without it, `prefixes` asks for prompts that begin alike, `page_data` and `html` make
the page, `perfetto` the trace.
"""
