# llama-cpp-python's build reads this first. Its library of command-line helpers takes longer to compile than all the rest, and
# the comparisons have no use for it. A variable here goes before the cache entry that the build sets.
set(LLAMA_BUILD_COMMON OFF)
