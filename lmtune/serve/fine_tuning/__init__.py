"""Files and fine-tuning jobs as the API of OpenAI has them; a job is an ordinary run."""
