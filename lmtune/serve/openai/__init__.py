"""The API of OpenAI over models of this machine: what programs ask for, and what they get."""
