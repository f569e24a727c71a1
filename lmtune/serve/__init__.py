"""Chat with a model: in the terminal (`terminal`), and in the browser (`server`, with the pages of `studio`)."""

import os

# Gradio reads these when it is used: it then sends no analytics, and keeps no record of answers for its monitoring
# page, which is closed here.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
