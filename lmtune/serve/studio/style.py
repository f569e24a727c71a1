"""How the app looks: a calm page in the system's own fonts, so that nothing is fetched from anywhere else."""

from __future__ import annotations

from typing import Any

import gradio as gr

CSS = """
.gradio-container { max-width: 1120px !important; width: 100% !important; margin: 0 auto !important;
  padding: 0 20px !important; }
.gradio-container > .main { padding: 0 !important; }
#top { align-items: center; flex-wrap: nowrap; padding: 18px 0 2px; }
#header h1 { font-size: 1.3rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; overflow-wrap: anywhere; }
#header h1 span { color: var(--body-text-color-subdued); font-weight: 400; }
#header p { color: var(--body-text-color-subdued); font-size: 0.875rem; margin: 2px 0 0; }
#clear, #open-settings { flex: none; min-width: 96px; border: 1px solid var(--border-color-primary);
  background: transparent; font-weight: 500; }
#clear:hover, #open-settings:hover { background: var(--background-fill-secondary); }

#open-settings { display: none; }
#notes, #kept { display: none !important; }

.column:has(> #top) { height: 100dvh; min-height: 420px; padding-bottom: 6px; flex-wrap: nowrap; gap: 14px; }
#top { flex: none; }
#columns { flex: 1 1 0; min-height: 0; }
#talk, #settings { height: 100%; }
#talk { flex-wrap: nowrap; gap: 10px; }
#talk > * { flex: none; }
#chats { flex: 1 1 0 !important; min-height: 120px; }
.answers { height: 100% !important; min-height: 0; border-radius: 12px;
  border: 1px solid var(--border-color-primary) !important; }
.answers .speaker { color: var(--body-text-color-subdued); font-size: 0.8rem; line-height: 1.4; padding: 0 0 2px 3px;
  overflow-wrap: anywhere; user-select: none; }
.answers .message { font-size: 1rem; line-height: 1.55; }
.answers .bot.message { border-color: transparent; box-shadow: none; background: transparent; padding-left: 2px; }
.answers .user.message { border-color: transparent; background: var(--primary-100); }
.dark .answers .user.message { background: var(--primary-900); }
.answers .examples { gap: 10px; grid-template-columns: 1fr 1fr !important; }
.answers .example { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px;
  background: transparent; }
.answers .example:hover { border-color: var(--primary-400); }

.form:has(> #question) { border: 1px solid var(--border-color-primary); border-radius: 12px; }
.form:has(> #question):focus-within { border-color: var(--primary-400); }
#question { padding: 4px 6px; }
#question textarea { font-size: 1rem; line-height: 1.5; background: transparent !important; border: none !important;
  box-shadow: none !important; max-height: 26dvh; overflow-y: auto !important; }
#status { min-height: 24px; max-height: 22dvh; overflow-y: auto; padding: 0 6px; }
#status .busy::before { content: ""; display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.5em;
  border: 2px solid var(--primary-500); border-right-color: transparent; border-radius: 50%;
  animation: turning 0.9s linear infinite; }
@keyframes turning { to { transform: rotate(360deg); } }
#status .note { color: var(--body-text-color-subdued); font-size: 0.85rem; }
#status .error { color: var(--error-text-color); font-size: 0.95rem; overflow-wrap: anywhere; }

#settings { padding: 0 8px 10px 10px; gap: 14px; flex-wrap: nowrap; overflow-y: auto; scrollbar-width: thin; }
#settings > * { flex: none; }
#settings .form, #settings .block { background: transparent; padding-left: 0; padding-right: 0; gap: 14px; }
#settings .block { padding-top: 0; padding-bottom: 0; }
#settings input[type=number], #settings textarea, #settings input:not([type]), #settings input[type=text] {
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 8px; }
#model .wrap { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; box-shadow: none; }
#model .wrap:focus-within { border-color: var(--primary-400); }
#model .wrap-inner { padding: 2px 6px; }
#model .wrap input { background: transparent; border: none; }
#settings input[type=number] { width: 58px; }
#mode .wrap { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 0; background: var(--neutral-200);
  border-radius: 10px; padding: 3px; }
.dark #mode .wrap { background: var(--neutral-800); }
#mode label { position: relative; justify-content: center; background: transparent; border: none; box-shadow: none;
  padding: 5px 4px; border-radius: 8px; }
#mode label input { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0; cursor: pointer; }
#mode label span { margin: 0; }
#mode label:focus-within { outline: 2px solid var(--primary-400); }
#mode label.selected { background: var(--block-background-fill); color: var(--body-text-color); font-weight: 600; }

@media (max-width: 768px) {
  .gradio-container { padding: 0 12px !important; }
  #top { padding-top: 10px; gap: 6px 8px; flex-wrap: wrap; }
  #header { flex: 1 1 100%; }
  #header h1 { font-size: 1.1rem; }
  #header p { font-size: 0.8rem; }
  #open-settings { display: block; }
  #open-settings, #clear { flex: 1 1 0; padding: 4px 10px; }
  #chats { flex-direction: column; flex-wrap: nowrap; }
  #chats > .answers:not(:only-child) { height: 50% !important; }
  #columns { position: relative; flex-direction: column; }
  #columns > * { width: 100%; min-width: 0 !important; flex: none; }
  #settings { position: absolute; top: 0; left: 0; z-index: 30; height: auto; max-height: 100%; padding: 16px;
    background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); border-radius: 12px;
    box-shadow: 0 12px 32px rgb(0 0 0 / 18%); visibility: hidden; }
  #columns[data-settings=open] #settings { visibility: visible; }
}
"""

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")


def theme() -> Any:
    """Gradio's plain theme with one accent, and less of borders and boxes."""
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=_SANS, font_mono=_MONO, radius_size="lg"
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        block_border_width="0px", block_shadow="none",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )  # fmt: skip
