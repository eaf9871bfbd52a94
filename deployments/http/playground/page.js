// The page: asks, stops, compares, and says how it goes.

let running = null; // what stops the answer that is being written
let model = null;

/** The request but for its messages and strategy. A field that is left empty is the server's to choose. */
function options() {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const numberOrWord = (id) => (isNaN(byId(id).value) ? byId(id).value : number(id));
  return {
    model,
    stream: true,
    temperature: number("temperature"),
    max_tokens: number("limit"),
    rapid: {
      trace: true,
      num_draft_tokens: number("gamma") ?? "auto",
      transfer_strength: numberOrWord("strength"),
      transfer_temperature: number("transfer"),
      transfer_divergence: number("divergence"),
      refresh: byId("refresh").value || undefined,
      verification: byId("verification").value || undefined,
      retrieval: {
        method: byId("method").value || undefined,
        max_tokens: number("budget"),
        chunk_tokens: number("chunk"),
      },
    },
  };
}

async function ask() {
  if (running) return;
  const question = byId("question").value;
  if (!question.trim()) {
    fail(new Problem("There is no question yet.", "Type one, then ask."));
    byId("question").focus();
    return;
  }
  running = new AbortController();
  busy(true);
  const answers = [];
  try {
    model ??= await servedModel();
    const body = { ...options(), messages: [{ role: "user", content: message(question) }] };
    for (const strategy of chosen()) {
      answers.push(new Answer(strategy));
      byId("answers").append(answers.at(-1).element);
      say(strategy + " is reading …");
      await write(answers.at(-1), { ...body, rapid: { ...body.rapid, strategy } }, running.signal);
    }
    say(answers.map(told).join(" "));
    if (answers.length === 2) byId("verdict").textContent = verdict(...answers);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else fail(error);
  } finally {
    answers.forEach((answer) => answer.end());
    running = null;
    busy(false);
  }
}

async function write(answer, body, signal) {
  for await (const chunk of completion(body, signal)) {
    const round = chunk.rapid_round;
    if (round) {
      if (!answer.rounds.length) say(answer.strategy + " is writing …");
      answer.add(round);
      if (round.chunks) showPassages(round.chunks);
    } else {
      answer.addTail(chunk.choices[0]?.delta.content ?? "");
    }
    if (chunk.rapid) answer.finish(chunk.rapid);
  }
}

function told(answer) {
  const { emitted, acceptance_rate: rate } = answer.statistics;
  const drafts = rate === null ? "no drafts" : Math.round(100 * rate) + "% of its draft tokens kept";
  return answer.strategy + ": " + count(emitted) + " tokens in " + seconds(answer.seconds) + ", " + drafts + ".";
}

function verdict(first, second) {
  const [fast, slow] = first.speed >= second.speed ? [first, second] : [second, first];
  const times = (fast.speed / slow.speed).toFixed(2);
  const greedy = byId("temperature").value === "0";
  const why = greedy ? "Their texts differ: in half precision a near tie can fall either way. " : "Their texts differ. ";
  const same = first.text === second.text ? "Both wrote the same text. " : why;
  const known = second.statistics.cached_tokens;
  return (
    "While decoding, " + fast.strategy + " wrote " + times + " times as fast as " + slow.strategy + ". " + same +
    "They ran one after the other, so that neither took the other’s memory bandwidth" +
    (known ? "; the second found " + count(known) + " tokens of the prompt read already, the first " + count(first.statistics.cached_tokens) + "." : ".")
  );
}

function stop() {
  running?.abort();
}

function busy(isBusy) {
  byId("ask").disabled = isBusy;
  byId("stop").disabled = !isBusy;
  byId("conversation").setAttribute("aria-busy", String(isBusy));
  if (!isBusy) {
    if (document.activeElement === document.body) byId("ask").focus(); // a button that was disabled lost it
    return;
  }
  byId("error").replaceChildren();
  byId("answers").replaceChildren();
  byId("verdict").textContent = "";
}

function say(text) {
  byId("status").textContent = text;
}

function fail(error) {
  say("");
  byId("error").replaceChildren(element("strong", { textContent: error.message }), " " + (error.advice ?? ""));
}

async function take(file) {
  byId("error").replaceChildren();
  try {
    await useFile(file);
  } catch (error) {
    fail(error);
  }
}

// Small things

function byId(id) {
  return document.getElementById(id);
}

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function count(number) {
  return number.toLocaleString("en");
}

function seconds(number) {
  return number < 0.0995 ? (1e3 * number).toFixed(0) + " ms" : number.toFixed(number < 9.95 ? 2 : 1) + " s";
}

// The beginning

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = "Theme: " + theme;
}

/** What the chosen strategies are. */
function hint() {
  byId("other").disabled = !byId("compare").checked;
  byId("hint").textContent = chosen().map((name) => name + ": " + STRATEGIES[name]).join(". ") + ".";
}

function chosen() {
  return [byId("strategy").value, ...(byId("compare").checked ? [byId("other").value] : [])];
}

function begin() {
  for (const id of ["strategy", "other"]) {
    byId(id).append(...Object.keys(STRATEGIES).map((name) => new Option(name)));
    byId(id).onchange = hint;
  }
  byId("strategy").value = DEFAULT_STRATEGY;
  byId("other").value = "autoregressive";
  byId("compare").onchange = hint;
  hint();
  byId("form").onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  byId("stop").onclick = stop;
  byId("document").oninput = documentChanged;
  byId("edit").onclick = () => view("edit");
  byId("read").onclick = () => view("read");
  byId("clear").onclick = () => {
    useText("");
    passageSizes("", "");
  };
  byId("example").onclick = () => {
    useText(byId("example-text").content.textContent);
    passageSizes(384, 96); // the example is short: with more, hardly anything of it would be left out
    byId("question").value ||= "How does the station get its electricity?";
    byId("question").focus();
  };
  byId("file").onchange = () => {
    if (byId("file").files.length) take(byId("file").files[0]);
    byId("file").value = "";
  };
  byId("theme").onclick = () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
  setTheme("system");
  byId("key").value = sessionStorage.getItem("rapid-key") ?? "";
  byId("key").onchange = () => {
    sessionStorage.setItem("rapid-key", byId("key").value.trim());
    greet();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
    if (event.key === "Escape") stop();
  });
  const pane = byId("source");
  pane.addEventListener("dragover", (event) => {
    event.preventDefault();
    pane.classList.add("over");
  });
  pane.addEventListener("dragleave", () => pane.classList.remove("over"));
  pane.addEventListener("drop", (event) => {
    pane.classList.remove("over");
    if (!event.dataTransfer.files.length) return; // a piece of text falls into the field as it does anywhere
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  greet();
}

async function greet() {
  try {
    model = await servedModel();
    byId("model").textContent = model;
    byId("error").replaceChildren();
  } catch (error) {
    fail(error);
  }
}

begin();
