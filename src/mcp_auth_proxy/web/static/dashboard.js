// The page works without this file. With it, it is live, copies with one click, and connects in a popup.
(() => {
  const stream = document.currentScript.dataset.stream;
  const cards = document.querySelector("[data-cards]");
  const events = document.querySelector("[data-events]");
  const announcer = document.querySelector("[data-announce]");
  const live = document.querySelector("[data-live]");
  const announce = (text) => { announcer.textContent = text; };

  // Times as people say them; the time itself is in the title.
  const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  const units = [["day", 86400], ["hour", 3600], ["minute", 60]];
  const showTimes = (root) => {
    for (const time of root.querySelectorAll("[data-time]")) {
      const at = new Date(time.dateTime);
      const seconds = (at - Date.now()) / 1000;
      const [unit, size] = units.find(([, size]) => Math.abs(seconds) >= size) ?? ["minute", 60];
      time.textContent = relative.format(Math.trunc(seconds / size), unit);
      time.title = at.toLocaleString();
    }
  };

  // Copying.
  const showButtons = (root) => {
    for (const button of root.querySelectorAll("[data-copy]")) button.hidden = false;
  };
  const copy = async (element) => {
    try {
      await navigator.clipboard.writeText(element.textContent);
    } catch {
      // Without TLS there is no clipboard, but what is selected can be copied.
      getSelection().selectAllChildren(element);
      return document.execCommand("copy");
    }
    return true;
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const done = await copy(button.closest("li, .address").querySelector("[data-copy-text]"));
    announce(done ? "Copied" : "Selected: copy it with your keyboard");
    const label = button.firstChild;
    label.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { label.textContent = "Copy"; }, 2000);
  });

  // Connecting: in a popup, or else in this tab.
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (!form.matches("[data-popup]")) return;
    form.querySelector("input[name=popup]")?.remove();
    form.removeAttribute("target");
    const name = `connect-${form.closest("[data-server]").id}`;
    const popup = window.open("", name, "popup,width=640,height=760");
    if (!popup) return;
    const field = Object.assign(document.createElement("input"), { type: "hidden", name: "popup", value: "1" });
    form.append(field);
    form.target = name;
    popup.focus();
  });

  // What changes.
  const parse = (html) => {
    const template = document.createElement("template");
    template.innerHTML = html;
    showTimes(template.content);
    showButtons(template.content);
    return template.content.firstElementChild;
  };
  const update = (card, fresh) => {
    const part = card.querySelector("[data-part]");
    const focused = part.contains(document.activeElement) ? document.activeElement.textContent : null;
    part.replaceWith(fresh.querySelector("[data-part]"));
    Object.assign(card.dataset, fresh.dataset);
    if (focused === null) return;
    const same = [...card.querySelectorAll("[data-part] button, [data-part] code")];
    (same.find((element) => element.textContent === focused) ?? card.querySelector("h3")).focus();
  };
  const change = (message) => {
    const said = [];
    for (const { id, name, word, digest, html } of message.cards) {
      const card = document.getElementById(id);
      if (html === null || card?.dataset.digest === digest) continue;
      const fresh = parse(html);
      if (card && card.dataset.state !== fresh.dataset.state) said.push(`${name}: ${word}`);
      if (card) update(card, fresh);
      else cards.append(fresh);
    }
    const there = new Set(message.cards.map((card) => card.id));
    for (const card of cards.querySelectorAll("[data-server]")) {
      if (!there.has(card.id)) card.remove();
    }
    if (message.events !== null) {
      events.innerHTML = message.events;
      showTimes(events);
    }
    if (said.length) announce(said.join(". "));
  };

  // A page that is hidden, or that its user only passes through, needs no connection: browsers have only six for one host.
  let source = null;
  let timer = 0;
  const openIn = (delay) => {
    clearTimeout(timer);
    timer = setTimeout(open, delay);
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
    live.hidden = true;
  };
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource(stream);
    source.addEventListener("open", () => { live.hidden = false; });
    source.addEventListener("change", (event) => change(JSON.parse(event.data)));
    source.addEventListener("over", () => {
      close();
      location.reload();
    });
    source.addEventListener("error", () => {
      live.hidden = true;
      if (source?.readyState !== EventSource.CLOSED) return;
      close();
      openIn(10000);
    });
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : openIn(0)));
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", () => openIn(700));
  setInterval(() => showTimes(document), 30000);
  showTimes(document);
  showButtons(document);
})();
