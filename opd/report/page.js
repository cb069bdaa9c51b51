"use strict";
// The token view. Text of runs is only ever set as textContent. A token is [text, id, student, teacher, entropy, flags, alternatives, span].
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const columns = document.getElementById("columns");
  if (!columns) return;
  const [step, least, order, detail] = ["step", "least", "order", "detail"].map((name) => document.getElementById(name));
  const steps = [...new Set(runs.flatMap((run) => run.steps))].sort((one, other) => one - other);
  const FULL_COLOUR = 3; // nats
  const MAX_SHOWN = 12; // completions per run, where the largest disagreements come first
  const [CLIPPED, ADVANTAGE_CLIPPED] = [1, 2]; // flags, as in tokens.py
  let chosen = null;

  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const gap = (token) => (token[2] === null || token[3] === null ? null : token[3] - token[2]);
  const largest = (rollout) => rollout.tokens.reduce((most, token) => Math.max(most, Math.abs(gap(token) ?? 0)), 0);
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
  const percent = (logp) => {
    const share = 100 * Math.exp(logp);
    return share > 0 && share < 0.01 ? "<0.01%" : `${share.toFixed(share < 1 ? 2 : 1)}%`;
  };
  for (const run of runs) for (const rollout of run.rollouts) rollout.largest = largest(rollout);
  const most = Math.max(...runs.flatMap((run) => run.rollouts.map((rollout) => rollout.largest)));
  least.max = (Math.floor(10 * most) + 1) / 10;

  const shownOf = (run) => {
    const enough = (rollout) => rollout.largest >= Number(least.value);
    if (order.value === "largest") {
      return run.rollouts.filter(enough).sort((one, other) => other.largest - one.largest).slice(0, MAX_SHOWN);
    }
    const wanted = steps[Number(step.value)];
    const nearest = run.steps.filter((candidate) => candidate <= wanted).pop() ?? run.steps[0];
    return run.rollouts.filter((rollout) => rollout.step === nearest && enough(rollout));
  };

  const tokenNode = (rollout, token, index) => {
    const node = make("bdi", "tok", token[0] === "" ? "∅" : token[0]);
    const difference = gap(token);
    if (difference !== null) {
      const strength = Math.min(1, Math.abs(difference) / FULL_COLOUR);
      node.style.backgroundColor = `rgba(var(${difference < 0 ? "--less" : "--more"}), ${(0.75 * strength).toFixed(3)})`;
    }
    node.classList.toggle("dim", Math.abs(difference ?? 0) < Number(least.value));
    node.classList.toggle("clipped", Boolean(token[5] & CLIPPED));
    node.classList.toggle("cut", Boolean(token[5] & ADVANTAGE_CLIPPED));
    node.classList.toggle("off", difference === null || (rollout.trained !== null && index >= rollout.trained));
    node.tabIndex = -1;
    node.setAttribute("role", "button");
    node.setAttribute("aria-describedby", "detail");
    node.token = token;
    node.rollout = rollout;
    node.index = index;
    return node;
  };

  const rolloutNode = (rollout) => {
    const node = make("article", "rollout");
    const facts = [`step ${rollout.step}`, `sample ${rollout.sample}`];
    if (rollout.attempt !== null) facts.push(`attempt ${rollout.attempt}`);
    facts.push(`${(rollout.tokens.length + rollout.more).toLocaleString("en")} tokens`, `differs by up to ${rollout.largest.toFixed(2)} nats`);
    node.append(make("p", "", facts.join(" · ")));
    const prompt = make("p", "prompt");
    prompt.append(make("bdi", "", rollout.prompt));
    node.append(prompt);
    const line = make("div", "tokens");
    rollout.tokens.forEach((token, index) => {
      if (index > 0 && rollout.trained !== null && index === rollout.trained) {
        const edge = make("span", "edge");
        edge.title = "not trained on from here on";
        line.append(edge);
      }
      line.append(tokenNode(rollout, token, index));
    });
    if (rollout.more) line.append(make("span", "rest", ` … ${rollout.more.toLocaleString("en")} more tokens are not in this page`));
    if (rollout.truncated) {
      const mark = make("span", "mark", " ✂");
      mark.title = "truncated at the limit of new tokens";
      line.append(mark);
    }
    node.append(line);
    return node;
  };

  const prob = (label, logp, kind) => {
    const row = make("div", `prob ${kind}`);
    const bar = make("span", "bar");
    const fill = make("i");
    fill.style.width = `${(100 * Math.exp(logp)).toFixed(2)}%`;
    bar.append(fill);
    row.append(make("span", "", label), bar, make("b", "", percent(logp)));
    row.title = `${logp.toFixed(3)} nats`;
    return row;
  };

  const showDetail = (node) => {
    const [text, id, student, teacher, entropy, flags, alternatives, span] = node.token;
    const difference = gap(node.token);
    const parts = [make("p", "word", text === "" ? "∅" : text), make("p", "where", `id ${id} · position ${node.index + 1}`)];
    if (difference === null) {
      parts.push(make("p", "", "Not scored, or the score is not finite."));
    } else {
      if (span) parts.push(make("p", "", `One span for both tokenizers: ${span}`));
      parts.push(prob("student", student, "student"), prob("teacher", teacher, "teacher"));
      parts.push(make("p", "delta", `teacher − student ${signed(difference)} nats`));
      if (entropy !== null) parts.push(make("p", "", `entropy of the student ${entropy.toFixed(2)} nats`));
    }
    const notes = [];
    if (flags & CLIPPED) notes.push("ratio clipped");
    if (flags & ADVANTAGE_CLIPPED) notes.push("advantage clipped");
    if (node.classList.contains("off")) notes.push("not trained on");
    if (notes.length) parts.push(make("p", "flags", notes.join(", ")));
    if (alternatives.length) {
      parts.push(make("h4", "", "The teacher’s most likely tokens"));
      for (const [word, logp, same] of alternatives) parts.push(prob(word === "" ? "∅" : word, logp, same ? "alt same" : "alt"));
    }
    detail.replaceChildren(...parts);
  };

  const choose = (node) => {
    if (chosen) chosen.classList.remove("chosen");
    chosen = node;
    node.classList.add("chosen");
    for (const other of columns.querySelectorAll('.tok[tabindex="0"]')) other.tabIndex = -1;
    node.tabIndex = 0;
    showDetail(node);
  };

  const render = () => {
    const all = order.value === "largest";
    step.disabled = all;
    document.getElementById("step-name").textContent = all ? "all" : String(steps[Number(step.value)]);
    document.getElementById("least-name").textContent = `${Number(least.value).toFixed(1)} nats`;
    chosen = null;
    columns.replaceChildren(
      ...runs.map((run) => {
        const column = make("div", "column");
        if (runs.length > 1) {
          const name = make("h3");
          name.append(make("bdi", "", run.name));
          column.append(name);
        }
        const shown = shownOf(run);
        column.append(...shown.map(rolloutNode));
        if (!shown.length) column.append(make("p", "none", "No completion here has such a token."));
        return column;
      }),
    );
    const first = columns.querySelector(".tok");
    if (first) first.tabIndex = 0;
  };

  const tokenAt = (event) => (event.target instanceof Element ? event.target.closest("#columns .tok") : null);
  columns.addEventListener("pointerover", (event) => {
    const node = tokenAt(event);
    if (node) showDetail(node);
  });
  columns.addEventListener("pointerleave", () => {
    if (chosen) showDetail(chosen);
  });
  columns.addEventListener("click", (event) => {
    const node = tokenAt(event);
    if (node) node.focus();
  });
  columns.addEventListener("focusin", (event) => {
    const node = tokenAt(event);
    if (node) choose(node);
  });
  columns.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const node = tokenAt(event);
    if (!move || !node) return;
    const all = [...columns.querySelectorAll(".tok")];
    const next = all[all.indexOf(node) + move];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
  for (const control of [step, least, order]) control.addEventListener("input", render);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  render();
})();
