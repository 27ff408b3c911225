"use strict";

// Follows /events and shows the newest picture. A picture is swapped in only once it is decoded,
// so the page never flickers; the caption changes together with it.

const SILENT_MS = 20_000; // Four missed beats: the connection is gone, whatever the browser says.
const RETRY_MS = 2_000;
const COUNTED_MS = 60_000;

const part = (id) => document.getElementById(id);

let session = null; // Label of the session on the page.
let wanted = null; // Address of the picture to show next.
let shown = null; // { url, run, trial, kind, stimulusAt } of the picture on the page.
let clockOffset = 0; // The server's clock minus this page's monotonic one, ms.
let source = null;
let lastHeard = performance.now();
let retryTimer = 0;

function setText(id, text) {
  const element = part(id);
  if (element.textContent !== text) element.textContent = text;
}

function setHidden(id, hidden) {
  const element = part(id);
  if (element.hidden !== hidden) element.hidden = hidden;
}

function connect() {
  clearTimeout(retryTimer);
  if (source) source.close();
  lastHeard = performance.now();
  source = new EventSource("/events");
  source.addEventListener("state", (event) => heard(event, showState));
  source.addEventListener("beat", (event) => heard(event, () => {}));
  source.onerror = () => {
    setHidden("connection", false);
    // After an answer such as 503 the browser gives up for good; we do not.
    if (source.readyState === EventSource.CLOSED) {
      clearTimeout(retryTimer);
      retryTimer = setTimeout(connect, RETRY_MS);
    }
  };
}

function heard(event, act) {
  lastHeard = performance.now();
  setHidden("connection", true);
  const state = JSON.parse(event.data);
  clockOffset = state.server_time_ms - lastHeard;
  act(state);
}

function showState(state) {
  setHidden("warning", state.random_weights !== true);
  setText("session", state.label ?? "");
  setText("progress", progress(state));

  if (state.label !== session) {
    session = state.label;
    clear();
  }
  const newest = state.trial;
  if (!newest || newest.kinds.length === 0) {
    clear();
    return;
  }
  const best = newest.kinds[newest.kinds.length - 1];
  const picture = {
    url: best.url,
    run: newest.run,
    trial: newest.trial,
    kind: best.kind,
    ratio: best.width / best.height,
    stimulusAt: newest.stimulus_at_ms,
    caption: newest.caption,
  };
  if (shown && shown.url === picture.url) {
    wanted = picture.url;
    shown = picture;
    describe(picture);
    return;
  }
  if (wanted !== picture.url) load(picture);
}

function progress(state) {
  if (state.run === null) return "";
  return state.volume === null
    ? `Run ${state.run}`
    : `Run ${state.run} · volume ${state.volume}`;
}

async function load(picture) {
  wanted = picture.url;
  const image = new Image();
  image.alt = `AI-generated reconstruction, ${picture.kind}, trial ${picture.trial} of run ${picture.run}`;
  image.src = picture.url;
  try {
    await image.decode();
  } catch {
    // Replaced or dropped meanwhile, or the connection failed: what is on the page stays.
    setTimeout(() => {
      if (wanted === picture.url) load(picture);
    }, RETRY_MS);
    return;
  }
  if (wanted === picture.url) swap(image, picture);
}

function swap(image, picture) {
  const layers = part("layers");
  const earlier = [...layers.children];
  for (const old of earlier) {
    old.alt = "";
    old.setAttribute("aria-hidden", "true");
  }
  document.documentElement.style.setProperty("--ratio", String(picture.ratio));
  layers.append(image);
  image.getBoundingClientRect(); // Lays out the transparent image, so that it fades in.
  image.classList.add("shown");
  const settle = () => earlier.forEach((old) => old.remove());
  const fades = matchMedia("(prefers-reduced-motion: no-preference)").matches;
  if (fades && earlier.length > 0) {
    image.addEventListener("transitionend", settle, { once: true });
    setTimeout(settle, 1_000); // A hidden tab may never end its transition.
  } else {
    settle();
  }

  shown = picture;
  setHidden("waiting", true);
  setText("trial", `Trial ${picture.trial} · run ${picture.run}`);
  setText("kind", picture.kind);
  describe(picture);
  setText("announcement", `Trial ${picture.trial}, run ${picture.run}: ${picture.kind}`);
  count();
}

// The words arrive after the picture they describe, and stay through its refinement.
function describe(picture) {
  setText("caption", picture.caption ? `“${picture.caption}”` : "");
  setHidden("caption", !picture.caption);
}

function clear() {
  wanted = null;
  if (!shown) return;
  shown = null;
  part("layers").replaceChildren();
  document.documentElement.style.removeProperty("--ratio");
  setHidden("waiting", false);
  setText("trial", "\u00a0");
  setText("kind", "");
  describe({ caption: null });
  setText("since", "\u00a0");
  setText("announcement", "Waiting for the first picture");
}

function count() {
  if (!shown) return;
  if (shown.stimulusAt === null) {
    setText("since", "\u00a0");
    return;
  }
  const elapsed = Math.max(0, performance.now() + clockOffset - shown.stimulusAt);
  setText(
    "since",
    elapsed >= COUNTED_MS
      ? "time since the stimulus: more than a minute"
      : `time since the stimulus: ${(elapsed / 1_000).toFixed(1)} s`,
  );
}

setInterval(count, 100);
setInterval(() => {
  if (performance.now() - lastHeard > SILENT_MS) {
    setHidden("connection", false);
    connect();
  }
}, 1_000);

connect();
