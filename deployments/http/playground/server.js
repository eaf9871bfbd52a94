// What the page asks of its server, and what went wrong in words.

class Problem extends Error {
  constructor(message, advice = "") {
    super(message);
    this.advice = advice;
  }
}

const ADVICE = {
  context_length_exceeded: "Shorten the document, or ask for a shorter answer under Settings.",
  overloaded: "Ask again in a moment.",
  engine_lost: "Ask again: another engine may take over.",
  model_not_found: "Reload the page: the server may have been started anew with another model.",
};

const ADVICE_BY_STATUS = {
  401: "Enter the API key under Settings, then ask again.",
  403: "Enter an API key that may do this under Settings, then ask again.",
  413: "Use a smaller document.",
  429: "The server is busy. Ask again in a moment.",
  503: "A part of the server is down or starting. Ask again in a moment.",
};

/** The server's answer to a request; throws a Problem where it refuses, or does not answer at all. */
async function request(path, options = {}) {
  const key = byId("key").value.trim();
  const headers = { ...options.headers, ...(key && { Authorization: "Bearer " + key }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached.", "See that it is running, then try again.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  return problem(body.error ?? { message: "The server answered with status " + response.status + "." }, response.status);
}

function problem(error, status) {
  return new Problem(error.message, ADVICE[error.code] ?? ADVICE_BY_STATUS[status]);
}

async function servedModel() {
  const models = await (await request("v1/models")).json();
  return models.data[0].id;
}

/** The chunks of a streamed chat completion, one by one. */
async function* completion(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const { kind, data } of serverSent(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (kind === "error") throw problem(chunk.error);
    yield chunk;
  }
  throw new Problem("The connection ended before the answer did.", "Ask again.");
}

async function* serverSent(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (pending + value).split("\n\n");
      pending = events.pop();
      for (const event of events) {
        const lines = event.split("\n");
        const field = (name) => lines.find((line) => line.startsWith(name + ": "))?.slice(name.length + 2);
        if (field("data") !== undefined) yield { kind: field("event"), data: field("data") };
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The connection to the server was lost.", "See that it is running, then ask again.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Gives the server a file to read; returns its file object once that is done. */
async function upload(file, signal) {
  const form = new FormData();
  form.append("purpose", "user_data");
  form.append("file", file);
  let known;
  try {
    known = await (await request("v1/files", { method: "POST", body: form, signal })).json();
    while (known.status !== "processed" && known.status !== "error") {
      if (known.rapid) say("The server is embedding " + file.name + ", " + Math.round(100 * known.rapid.progress) + "% done …");
      await new Promise((resolve) => setTimeout(resolve, 300));
      known = await (await request("v1/files/" + encodeURIComponent(known.id), { signal })).json();
    }
  } catch (error) {
    error.advice ||= "Paste the text of the document instead.";
    throw error;
  }
  if (known.status === "error") throw new Problem(known.status_details || "The server could not read " + file.name + ".");
  return known;
}

function forget(file) {
  request("v1/files/" + encodeURIComponent(file.id), { method: "DELETE" }).catch(() => {});
}
