"use strict";
// The provenance view: one output at a time, token by token. Everything shown comes from the JSON beside this script and
// is set as text, never as markup.
(() => {
  const trails = JSON.parse(document.getElementById("data").textContent).trails || [];
  const view = document.getElementById("provenance");
  if (!view || !trails.length) return;
  const sources = ["draft", "context", "passages", "corpus", "live", "target"];
  const get = (id) => document.getElementById(id);
  const [pick, methods, said, rounds, tokens, detail] = ["pick-output", "pick-method", "said", "rounds", "tokens", "detail"].map(get);
  const chips = [...view.querySelectorAll(".chip")];
  const titles = [...new Set(trails.map((trail) => trail.title))];
  let title = titles[0], method = null, only = null, spots = [], at = 0;

  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const percent = (value) => `${Math.round(100 * value)}%`;
  // Line ends are shown, and end the line.
  const shown = (text) => text.replace(/\r/g, "").replace(/\n/g, "↵\n");

  for (const name of titles) pick.append(new Option(name, name));
  if (titles.length < 2) pick.disabled = true;

  function current() {
    const own = trails.filter((trail) => trail.title === title);
    return own.find((trail) => trail.method === method) || own.find((trail) => trail.method === "rasd") || own[own.length - 1];
  }

  function draw() {
    const trail = current();
    method = trail.method;
    methods.replaceChildren(...trails.filter((each) => each.title === title).map((each) => {
      const pill = make("button", "pill", each.method);
      pill.type = "button";
      pill.setAttribute("role", "radio");
      pill.setAttribute("aria-checked", String(each === trail));
      pill.tabIndex = each === trail ? 0 : -1;
      pill.addEventListener("click", () => { method = each.method; draw(); methods.querySelector("[aria-checked=true]").focus(); });
      return pill;
    }));
    said.textContent = trail.said;
    said.hidden = !trail.said;
    const counts = sources.map(() => 0);
    const boxes = new Map(), columns = new Map();
    spots = trail.tokens.map((token, place) => {
      const [text, source, , , , , round] = token;
      counts[source] += 1;
      if (!boxes.has(round)) {
        const box = make("span", "round");
        box.setAttribute("role", "group");
        box.setAttribute("aria-label", round ? `round ${round}` : "prompt");
        boxes.set(round, box);
        columns.set(round, make("span"));
      }
      const spot = make("span", `tok s-${sources[source]}`, shown(text) || "∅");
      spot.setAttribute("role", "option");
      spot.setAttribute("aria-selected", "false");
      spot.tabIndex = -1;
      spot.addEventListener("mouseenter", () => select(place, false));
      spot.addEventListener("focus", () => select(place, false));
      boxes.get(round).append(spot);
      columns.get(round).append(make("i", `s-${sources[source]}`));
      return { spot, token, box: boxes.get(round), column: columns.get(round) };
    });
    tokens.replaceChildren(...boxes.values());
    rounds.replaceChildren(...columns.values());
    for (const chip of chips) {
      const count = counts[Number(chip.dataset.source)];
      chip.querySelector("b").textContent = percent(count / trail.tokens.length);
      chip.disabled = !count;
    }
    if (only !== null && !counts[only]) only = null;
    filter();
    const passes = Math.max(0, ...trail.tokens.map((token) => token[6]));
    const tau = passes ? ((trail.tokens.length - 1) / passes).toFixed(2) : "–";
    at = Math.min(at, spots.length - 1);
    spots.forEach((each, place) => { each.spot.tabIndex = place === at ? 0 : -1; });
    detail.style.removeProperty("--c");
    detail.textContent = `${trail.tokens.length} tokens in ${passes} rounds: ${tau} a round.`;
  }

  function filter() {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(Number(chip.dataset.source) === only));
    for (const { spot, token } of spots) spot.classList.toggle("dim", only !== null && token[1] !== only);
  }

  function select(place, focus) {
    for (const each of spots) {
      each.spot.classList.remove("now");
      each.box.classList.remove("now");
      each.column.classList.remove("now");
    }
    spots[at].spot.tabIndex = -1;
    spots[at].spot.setAttribute("aria-selected", "false");
    at = place;
    const { spot, token, box, column } = spots[place];
    const [text, source, others, score, value, depth, round] = token;
    for (const element of [spot, box, column]) element.classList.add("now");
    spot.tabIndex = 0;
    spot.setAttribute("aria-selected", "true");
    if (focus) spot.focus();
    const who = make("b", `s-${sources[source]}`, sources[source]);
    const size = spots.filter((each) => each.box === box).length;
    const parts = [make("code", "", JSON.stringify(text)), " from ", who];
    if (source === sources.length - 1) {
      parts.push(round ? `: nobody had it right, or the tree ended here. Round ${round} brought ${size}.` : ": the pass over the prompt ends with it.");
    } else {
      parts.push(others.length ? ` (also ${others.map((other) => sources[other]).join(", ")})` : "");
      parts.push(`, estimated ${percent(score)} likely after its parent, ${percent(value)} along its path; depth ${depth} of round ${round}, which brought ${size}.`);
    }
    detail.replaceChildren(...parts);
  }

  function step(event) {
    const row = (place) => spots[place].token[6];
    let to = at;
    if (event.key === "ArrowRight") to = Math.min(at + 1, spots.length - 1);
    else if (event.key === "ArrowLeft") to = Math.max(at - 1, 0);
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = spots.length - 1;
    else if (event.key === "ArrowDown") to = spots.findIndex((each, place) => place > at && row(place) > row(at));
    else if (event.key === "ArrowUp") {
      const before = spots.findLastIndex((each, place) => place < at && row(place) < row(at));
      to = before < 0 ? -1 : spots.findIndex((each) => each.token[6] === row(before));
    } else return;
    event.preventDefault();
    if (to >= 0) select(to, true);
  }

  pick.addEventListener("change", () => { title = pick.value; at = 0; draw(); });
  methods.addEventListener("keydown", (event) => {
    const pills = [...methods.children];
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    pills[(pills.findIndex((pill) => pill.tabIndex === 0) + move + pills.length) % pills.length].click();
  });
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const source = Number(chip.dataset.source);
      only = only === source ? null : source;
      filter();
    });
  }
  tokens.addEventListener("keydown", step);
  draw();
})();
