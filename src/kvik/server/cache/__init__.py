"""What the server keeps of its cache between requests, shows of it, and says about it."""
