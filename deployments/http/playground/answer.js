// One answer: its tokens as they come, its rounds, and what it took.

const ORIGINS = {
  accepted: "accepted draft: the drafter’s, kept by the target",
  lookup: "lookup: found earlier in the text, kept by the target",
  datastore: "datastore: found in other texts, kept by the target",
  chosen: "chosen: of the drafted answer that the target found best",
  self: "self: drafted by the target over a part of its cache, kept by the whole",
  recovered: "recovered: the target’s, for a draft token it refused",
  bonus: "bonus: the target’s, after a draft kept whole",
  plain: "plain: the target’s, with nothing drafted",
};

const FALLBACKS = {
  no_datastore: "No datastore is configured, so there was nothing to draft from.",
  no_long_context: "Nothing was retrieved: the text is short enough for the model to read at once, so no drafter took part.",
  nothing_above_threshold: "No passage was near enough to the question: drafts from the best ones did not move the answer.",
  drafter_window_exceeded: "The passages did not fit the drafter’s window, so it took no part.",
  overloaded: "The drafter had no room, so it took no part at the end.",
  retrieval_failed: "The retriever did not answer, so no drafter took part.",
  drafter_lost: "The drafter was lost on the way; the target went on without it.",
  engine_lost: "The drafter’s engine was lost on the way; the target went on without it.",
};

class Answer {
  constructor(strategy) {
    this.strategy = strategy;
    this.rounds = [];
    this.statistics = null;
    this.started = performance.now();
    this.element = byId("answer").content.firstElementChild.cloneNode(true);
    this.part("h3").textContent = strategy;
    const text = this.part(".text");
    text.setAttribute("aria-label", "Answer by " + strategy + "; the arrow keys go from token to token");
    text.onkeydown = (event) => this.step(event);
    text.onmouseover = (event) => this.point(event.target.closest(".token"));
    this.clock = setInterval(() => this.tick(), 100);
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  figure(name, value) {
    this.part("[data-figure=" + name + "]").textContent = value;
  }

  get text() {
    return this.part(".text").textContent;
  }

  get seconds() {
    return (this.ended ?? performance.now() - this.started) / 1e3;
  }

  /** Tokens a second of the rounds themselves: reading the prompt is not in it. */
  get speed() {
    const ms = sum(this.rounds.map((round) => round.ms));
    return (sum(this.rounds.map((round) => round.tokens.length)) / ms) * 1e3;
  }

  tick() {
    this.part(".clock").textContent = seconds(this.seconds);
  }

  add(round) {
    if (!this.rounds.length) this.figure("first", seconds((performance.now() - this.started) / 1e3));
    this.rounds.push(round);
    for (const { text, origin } of round.tokens) {
      const word = text.trimStart();
      this.part(".text").append(text.slice(0, text.length - word.length)); // a space before it takes no colour
      if (!word) continue;
      const token = element("span", { className: "token " + origin, textContent: word, title: ORIGINS[origin] });
      token.dataset.round = this.rounds.length - 1;
      this.part(".text").append(token);
    }
    this.count();
    this.draw();
  }

  /** Text that was held back to the end. */
  addTail(text) {
    this.part(".text").append(text);
  }

  count() {
    const drafted = sum(this.rounds.map((round) => round.drafted));
    const accepted = sum(this.rounds.map((round) => round.accepted));
    this.figure("speed", this.speed.toFixed(1));
    this.figure("acceptance", drafted ? Math.round((100 * accepted) / drafted) + "%" : "–");
    this.figure("gamma", this.rounds.at(-1).drafted);
    this.figure("rounds", this.rounds.length);
    this.part(".caption").textContent =
      "A column a round: " + (drafted ? accepted + " of " + drafted + " draft tokens kept (filled)" : "nothing drafted yet") +
      "; the foot is the target’s own token.";
  }

  /** A column a round: its outline is what was drafted, its fill what stood, its foot the target’s own token. */
  draw() {
    const svg = this.part(".rounds");
    const highest = Math.max(4, ...this.rounds.map((round) => round.drafted));
    const columns = Math.max(40, this.rounds.length);
    svg.setAttribute("viewBox", "0 0 " + columns + " " + (highest + 1));
    svg.setAttribute("aria-label", "Drafted and accepted tokens in each of " + this.rounds.length + " rounds");
    const bars = this.rounds.flatMap((round, i) => [
      bar("drafted", i, highest - round.drafted, round.drafted),
      bar("stood " + round.source, i, highest - round.accepted, round.accepted),
      bar("own", i, highest + 0.25, 0.5),
    ]);
    svg.replaceChildren(...bars.filter(Boolean));
  }

  finish(statistics) {
    this.end();
    this.statistics = statistics;
    const { timings_ms: times, fallback, prompt_tokens, cached_tokens, confidence } = statistics;
    this.part(".fallback").textContent = fallback ? (FALLBACKS[fallback] ?? "No drafter took part: " + fallback + ".") : "";
    const entries = Object.entries(times).filter(([, ms]) => ms > 0);
    const rows = entries.map(([name, ms]) => [name.replace("_", " "), seconds(ms / 1e3)]);
    rows.push(["prompt", count(prompt_tokens) + " tokens, " + count(cached_tokens) + " of them known already"]);
    if (confidence !== null) rows.push(["confidence of the passages", Math.round(100 * confidence) + "%"]);
    this.part(".times dl").replaceChildren(...rows.map(([name, value]) => {
      const row = element("div");
      row.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
      return row;
    }));
    this.part(".times").hidden = false;
  }

  end() {
    clearInterval(this.clock);
    this.ended ??= performance.now() - this.started;
    this.tick();
  }

  // From token to token

  step(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const tokens = [...this.element.querySelectorAll(".text .token")];
    const at = tokens.findIndex((token) => token.classList.contains("current"));
    this.point(tokens[Math.max(0, Math.min(tokens.length - 1, at + move))]);
  }

  /** Tells where `token` came from, and shows its round. */
  point(token) {
    if (!token) return;
    const index = Number(token.dataset.round);
    const round = this.rounds[index];
    this.element.querySelectorAll(".current").forEach((other) => other.classList.remove("current"));
    this.element.querySelectorAll(".same-round").forEach((other) => other.classList.remove("same-round"));
    this.element.querySelectorAll("[data-round='" + index + "']").forEach((other) => other.classList.add("same-round"));
    token.classList.add("current");
    const drafted = round.drafted ? round.accepted + " of " + round.drafted + " draft tokens kept, " : "";
    this.part(".detail").textContent =
      "“" + token.textContent + "” " + token.title + " · round " + (index + 1) + ": " + drafted + round.ms.toFixed(0) + " ms";
  }
}

function bar(kind, i, y, height) {
  if (!height) return null;
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const place = { x: i + 0.12, y, width: 0.76, height };
  for (const [name, value] of Object.entries(place)) rect.setAttribute(name, value);
  rect.setAttribute("class", kind);
  rect.dataset.round = i;
  return rect;
}
