// The document: where it comes from, and what was retrieved of it.

const source = {
  file: null, // what the server calls it, where the server read it
  pieces: [], // the retrieved chunks
};

const sourceText = () => byId("document").value;

/** The content of the user's message: the document, and behind it the question. */
function message(question) {
  // The last paragraph of a long message is its question, so it must be one paragraph.
  const asked = question.trim().replace(/\n\s*\n/g, "\n");
  if (source.file) return [{ type: "file", file: { file_id: source.file.id } }, { type: "text", text: asked }];
  return sourceText().trim() ? sourceText() + "\n\n" + asked : asked;
}

function useText(text) {
  dropUpload();
  byId("document").value = text;
  documentChanged();
}

function passageSizes(budget, longest) {
  byId("budget").value = budget;
  byId("chunk").value = longest;
}

function documentChanged() {
  showPassages([]);
  const { length } = sourceText();
  byId("size").textContent = source.file ? "" : length ? count(length) + " characters" : "";
}

function dropUpload() {
  if (source.file) forget(source.file);
  source.file = null;
  byId("uploaded").hidden = true;
  byId("document").hidden = false;
}

/** Text is read here; all else the server reads. */
async function useFile(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const text = decoded(bytes);
  if (text === null) return useUpload(file);
  useText(/\.html?$/i.test(file.name) ? textOfHtml(text) : text);
  say(file.name + " was read.");
}

/** The text in UTF-8 `bytes`, or null where they are something else. */
function decoded(bytes) {
  try {
    return bytes.includes(0) || startsWith(bytes, "%PDF") ? null : new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return null;
  }
}

const startsWith = (bytes, mark) => [...mark].every((letter, i) => bytes[i] === letter.charCodeAt(0));

/** What a reader sees of a page of HTML, a line to each block. Nothing in it is run or loaded. */
function textOfHtml(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  page.querySelectorAll("script, style, template, noscript, nav").forEach((element) => element.remove());
  page.querySelectorAll("p, div, li, tr, br, h1, h2, h3, h4, h5, h6, section, article, blockquote, pre").forEach((block) => {
    block.append("\n\n");
    if (block.tagName === "BR") block.replaceWith("\n");
  });
  return page.body.textContent.replace(/[ \t]+/g, " ").replace(/ ?\n ?/g, "\n").replace(/\n{3,}/g, "\n\n").trim();
}

async function useUpload(file) {
  say("The server is reading " + file.name + " …");
  const known = await upload(file);
  useText("");
  passageSizes("", ""); // the server embedded it in passages of its own size
  source.file = known;
  const tokens = known.rapid?.tokens;
  byId("uploaded").textContent = known.filename + (tokens ? " · " + count(tokens) + " tokens" : "") + " · read by the server";
  byId("uploaded").hidden = false;
  byId("document").hidden = true;
  say(known.filename + " was read.");
}

// What was retrieved

/** Marks `chunks` in the document, and lists them; none of them hides the map. */
function showPassages(chunks) {
  const text = source.file ? "" : sourceText();
  const unit = utf16Offsets(text);
  source.pieces = chunks
    .filter((chunk) => chunk.content === 0)
    .map((chunk) => ({ ...chunk, start: source.file ? chunk.start : unit(chunk.start), end: source.file ? chunk.end : unit(chunk.end) }));
  const { pieces } = source;
  const scores = pieces.map((piece) => piece.score);
  const best = Math.max(...scores);
  const strengths = scores.map((score) => Math.max(0.15, score / Math.max(best, 0.01)));
  byId("map").hidden = byId("views").hidden = !pieces.length;
  if (source.file) byId("views").hidden = true;
  drawStrip(pieces, strengths, text.length);
  byId("chunks").replaceChildren(...pieces.map((piece, i) => listed(piece, i, text)));
  markText(pieces, strengths, text);
  view(pieces.length && !source.file ? "read" : "edit");
  if (!byId("passages").hidden) reveal(scores.indexOf(best));
}

/** The document as a bar. Of a file that the server read it is known how many passages there are, not how long. */
function drawStrip(pieces, strengths, length) {
  const passages = Math.max(source.file?.rapid?.chunks ?? 0, ...pieces.map((piece) => piece.position + 1));
  const blocks = pieces.map((piece, i) => {
    const block = element("span", { title: "Passage " + (piece.position + 1) + ", score " + piece.score.toFixed(2) });
    const [start, end] = length ? [piece.start / length, piece.end / length] : [piece.position / passages, (piece.position + 1) / passages];
    block.style.left = 100 * start + "%";
    block.style.width = 100 * (end - start) + "%";
    block.style.setProperty("--strength", strengths[i]);
    block.onclick = () => goTo(i);
    return block;
  });
  byId("strip").replaceChildren(...blocks);
}

function listed(piece, i, text) {
  const start = text.slice(piece.start, piece.end).trim().replace(/\s+/g, " ").slice(0, 90);
  const button = element("button", { type: "button" });
  const meter = element("span", { className: "meter" });
  meter.style.setProperty("--score", Math.max(0, Math.min(1, piece.score)));
  button.append(
    element("span", { className: "number", textContent: "Passage " + (piece.position + 1) }),
    meter,
    element("span", { className: "score", textContent: piece.score.toFixed(2) }),
    element("span", { className: "start", textContent: start ? start + " …" : "characters " + count(piece.start) + " to " + count(piece.end) }),
  );
  button.onclick = () => goTo(i);
  const item = element("li");
  item.append(button);
  return item;
}

function markText(pieces, strengths, text) {
  const parts = [];
  let at = 0;
  pieces.forEach((piece, i) => {
    const mark = element("mark", { textContent: text.slice(piece.start, piece.end) });
    mark.style.setProperty("--strength", strengths[i]);
    parts.push(text.slice(at, piece.start), mark);
    at = piece.end;
  });
  byId("passages").replaceChildren(...parts, text.slice(at));
}

function goTo(i) {
  if (source.file) return;
  view("read");
  reveal(i);
  byId("passages").querySelectorAll("mark").forEach((mark, at) => mark.classList.toggle("current", at === i));
  byId("passages").focus({ preventScroll: true });
  byId("passages").scrollIntoView({ block: "nearest" });
}

function reveal(i) {
  byId("passages").scrollTop = byId("passages").querySelectorAll("mark")[i].offsetTop - 12;
}

function view(which) {
  const reading = which === "read";
  byId("passages").hidden = !reading;
  byId("document").hidden = reading || source.file !== null;
  byId("edit").setAttribute("aria-pressed", String(!reading));
  byId("read").setAttribute("aria-pressed", String(reading));
}

/** From offsets in code points, which the server counts in, to those of `text` here. */
function utf16Offsets(text) {
  if (!/[\ud800-\udfff]/.test(text)) return (offset) => offset;
  const units = [0];
  for (const character of text) units.push(units.at(-1) + character.length);
  return (offset) => units[Math.min(offset, units.length - 1)];
}
