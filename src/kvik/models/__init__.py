"""One decoder, what describes it, and where its weights, words and templates come from."""
