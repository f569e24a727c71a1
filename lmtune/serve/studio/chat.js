// What the page does in the browser itself, where Gradio has no setting for it.
//
// Each answer gets its speaker's name above it; Escape stops an answer; buttons without words get a name for those who
// hear the page; the title follows the model; the conversation is kept in the browser's local storage, and sent back
// when the page is loaded again; and shown and copied text loses the invisible joiners of display.py. They keep a text
// from becoming HTML while it is read as Markdown; in the page's text nodes, which are read no more, and on the
// clipboard they would only be in the way.
(() => {
  const JOINER = /\u2060/g, INVISIBLE = /[\u2060\u2063]/g;
  const without = text => text.replace(INVISIBLE, "");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const NAMES = {"#question .submit-button": "Send", "#question .stop-button": "Stop (Escape)",
    "#question textarea": "Question"};

  let encoded = "", notes = {columns: []};

  function read() {
    const text = document.querySelector("#notes .md")?.textContent.trim() || "";
    if (!text || text === encoded) return;
    notes = JSON.parse(atob(text));
    if (!encoded) setTimeout(bringBack, 0, 50);
    encoded = text;
    if ("kept" in notes) try {
      if (notes.kept) localStorage.setItem(notes.key, notes.kept); else localStorage.removeItem(notes.key);
    } catch { /* a browser that keeps nothing */ }
  }

  function bringBack(triesLeft) {
    const field = document.querySelector("#kept textarea, #kept input");
    let text = "";
    try { text = localStorage.getItem(notes.key) || ""; } catch { /* as above */ }
    if (!text || !field || "kept" in notes || !triesLeft) return;
    field.value = text;
    field.dispatchEvent(new Event("input", {bubbles: true}));
    field.dispatchEvent(new KeyboardEvent("keypress", {key: "v", bubbles: true}));
    setTimeout(bringBack, 300, triesLeft - 1);  // Gradio hears nothing until it has set itself up
  }

  function nameSpeakers() {
    all(".answers").forEach((chat, column) => all(".message-row", chat).forEach((row, place) => {
      const text = notes.columns[column]?.[place]?.[0] || "";
      let line = row.querySelector(".speaker");
      if (!text) { if (line) line.remove(); return; }
      if (!line) {
        line = document.createElement("div");
        line.className = "speaker";
        row.querySelector(".flex-wrap").prepend(line);
      }
      if (line.textContent !== text) line.textContent = text;
    }));
  }

  function nameButtons() {
    for (const [selector, name] of Object.entries(NAMES)) for (const button of all(selector))
      if (button.getAttribute("aria-label") !== name) {
        button.setAttribute("aria-label", name);
        button.title = name;
      }
  }

  function nameWindow() {
    const name = document.querySelector("#header h1")?.firstChild?.textContent.trim();
    if (name && document.title !== `${name} · lmtune`) document.title = `${name} · lmtune`;
  }

  function clean() {
    for (const part of all(".answers .message")) {
      if (!part.textContent.includes("\u2060")) continue;
      const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const found = walker.currentNode;
        if (found.data.includes("\u2060")) found.data = found.data.replace(JOINER, "");
      }
      for (const named of all("[aria-label]", part)) named.setAttribute("aria-label", without(named.ariaLabel));
    }
  }

  let due = false;
  const update = () => { due = false; read(); nameSpeakers(); nameButtons(); nameWindow(); clean(); };
  const later = () => { if (!due) { due = true; queueMicrotask(update); } };
  new MutationObserver(later).observe(document, {
    subtree: true, childList: true, characterData: true,
  });

  // A message's copy button gives the message, not the form in which it is shown.
  let copied = null;
  document.addEventListener("click", event => {
    const panel = event.target.closest?.(".answers .message-buttons");
    copied = null;
    if (!panel) return;
    const chat = panel.closest(".answers"), row = panel.previousElementSibling;
    const place = all(".message-row", chat).indexOf(row), column = all(".answers").indexOf(chat);
    copied = notes.columns[column]?.[place]?.[1] || null;
    setTimeout(() => { copied = null; });
  }, true);
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(copied ?? without(text));
  }
  document.addEventListener("copy", event => {
    const field = event.target.closest?.("textarea, input");
    if (field) {
      const text = field.value.slice(field.selectionStart, field.selectionEnd);
      event.clipboardData.setData("text/plain", copied ?? without(text));
      event.preventDefault();
    }
  });

  const open = is => { document.querySelector("#columns").dataset.settings = is ? "open" : "closed"; };
  document.addEventListener("keydown", event => {
    if (event.key !== "Escape" || event.isComposing) return;
    open(false);
    document.querySelector("#question .stop-button")?.click();
  });
  document.addEventListener("click", event => {
    const opener = event.target.closest?.("#open-settings");
    const inside = event.target.closest?.("#settings, [role=listbox], .options");
    if (opener) open(document.querySelector("#columns").dataset.settings !== "open");
    else if (!inside) open(false);
  });
})();
