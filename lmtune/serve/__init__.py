"""Talking to a model: in the terminal (`terminal`), and in the browser (`page`, `conversation`, `server`)."""

import os

# Gradio reads these when it is used: no word about anyone's use of the app leaves the machine; and no record of answers
# is kept for its monitoring page, which is closed here, nor a table made of up to 10,000 of them after each answer.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
