// The page's conductor: reads the stream of states and hands each part to whoever shows it.

import { at, blocks, say, several } from "./dom.js";
import { Chat } from "./chat.js";
import { Graph } from "./graph.js";
import { showHappened, showLinks, showNodes, showPlan, spark } from "./panels.js";
import { showShape } from "./barcode.js";
import { Refused, events, key } from "./stream.js";

const LEAST_WAIT_MS = 1000;
const MOST_WAIT_MS = 10000;

const graph = new Graph(at("graph"));
const chat = new Chat(() => swarm?.model, askForKey);
let swarm = null;
let sessions = [];
let watching = null;

const parts = {
  swarm(state) {
    swarm = state;
    document.title = `${state.model} – BSNS`;
    say(at("model"), state.model);
    const here = state.nodes.filter((node) => node.condition === "serving").length;
    say(at("figure-rate"), state.tokens_per_s.toFixed(1));
    say(at("figure-answers"), state.answers);
    say(at("figure-nodes"), `${here} of ${state.nodes.length + state.nodes_not_shown}`);
    say(at("figure-repairs"), state.repairs);
    spark(at("spark"), state.history);
    const missing = state.missing.map(blocks).join(", ");
    status(missing ? "bad" : "good", missing ? `Nobody serves blocks ${missing}` : `All ${state.block_count} blocks served`);
    showNodes(state);
    showLinks(state);
    draw();
  },
  sessions(state) {
    sessions = state;
    offerSessions();
    draw();
  },
  plan: showPlan,
  shape: showShape,
  happened: showHappened,
};

function status(kind, text) {
  at("status").dataset.kind = kind;
  say(at("status"), text);
}

/** The chosen session, or the newest whose route we may see. */
function chosen() {
  const wanted = at("session").value;
  if (wanted === "none") return null;
  const visible = sessions.filter((session) => session.route);
  return visible.find((session) => session.id === wanted) ?? visible.at(-1) ?? null;
}

function offerSessions() {
  const select = at("session");
  const options = [["newest", "newest answer"], ["none", "none"]];
  for (const session of sessions) {
    if (session.route) options.push([session.id, `answer ${session.id}`]);
  }
  const now = [...select.options].map((option) => option.value).join();
  if (now === options.map(([value]) => value).join()) return; // an open list shall not jump
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = options.some(([value]) => value === before) ? before : "newest";
}

function draw() {
  if (!swarm) return;
  const session = chosen();
  graph.show(swarm, session?.route ?? []);
  const lost = swarm.nodes.filter((node) => node.condition === "lost").map((node) => node.name);
  const way = session ? ` Answer ${session.id} goes through ${session.route.map((hop) => hop.node).join(", ")}.` : "";
  const gone = lost.length ? ` Lost: ${lost.join(", ")}.` : "";
  say(at("graph-words"), `${several(swarm.nodes.length, "node")} and this gateway; arrow keys go from one to the next.${gone}${way}`);
}

function askForKey(message = "") {
  watching?.abort();
  at("main").hidden = true;
  at("key-form").hidden = false;
  say(at("key-error"), message);
  status("wait", "Waiting for a key");
  at("key").focus();
}

async function watch() {
  watching?.abort();
  const own = (watching = new AbortController());
  let wait = LEAST_WAIT_MS;
  while (!own.signal.aborted) {
    let why = "The gateway says nothing";
    try {
      for await (const [event, data] of events("/dashboard/events", { signal: own.signal })) {
        wait = LEAST_WAIT_MS;
        why = event === "trouble" ? data : "";
        if (!why) parts[event]?.(JSON.parse(data));
      }
      if (!why) continue; // streams end by themselves by and by
    } catch (error) {
      if (own.signal.aborted) return;
      if (error instanceof Refused && error.status === 401) {
        askForKey(key.get() ? "The gateway does not know this key." : "");
        key.forget();
        at("forget-key").hidden = true;
        return;
      }
      why = error instanceof TypeError ? "The gateway does not answer" : error.message;
    }
    status("bad", `${why}; trying again`);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, MOST_WAIT_MS);
  }
}

at("session").addEventListener("change", draw);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  at("main").hidden = false;
  at("forget-key").hidden = false;
  watch();
  at("chat-text").focus();
});
at("forget-key").addEventListener("click", () => {
  key.forget();
  at("forget-key").hidden = true;
  chat.clear();
  askForKey();
});
// A page that nobody looks at asks for nothing; an answer that runs goes on.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) watching?.abort();
  else if (!at("main").hidden) watch();
});
at("forget-key").hidden = !key.get();
offerSessions();
watch();
