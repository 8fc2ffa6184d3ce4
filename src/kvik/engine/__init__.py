"""A request's path, in reading order: sequence, batch, scheduler, sampler, engine, llm."""

import logging

# Quiet, unless the program that uses kvik wants to hear: then "kvik" is the logger to give a handler to.
logging.getLogger("kvik").addHandler(logging.NullHandler())
