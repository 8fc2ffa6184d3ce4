"""What asks servers that speak OpenAI's API over HTTP: kvik's own and others. Knows no model."""
