"use strict";
// The rating page: asks for a name, shows one task at a time, and sends every vote at once. The server has all state,
// so that a reload goes on where it stopped; votes that could not be sent are sent again until they are.
const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const RETRY_MS = 2000;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
let ballot = null, rater = "", current = null, done = new Set(), unsent = [], sending = false, turn = 0;
let addresses = [];

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}), Authorization: "Bearer " + token };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    const error = new Error((await answer.json().catch(() => ({}))).error || "error " + answer.status);
    error.refused = answer.status < 500;
    throw error;
  }
  return answer;
}

const query = (fields) => "?" + new URLSearchParams({ rater, ...fields });

function show(id) {
  for (const name of ["start", "task", "end", "closed"]) $(name).hidden = name !== id;
  $("progress").hidden = id === "start" || id === "closed";
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

function close(reason) {
  $("reason").textContent = reason;
  show("closed");
}

function count() {
  $("counted").textContent = `${done.size} of ${ballot.tasks}`;
  $("progress").max = ballot.tasks;
  $("progress").value = done.size;
}

async function begin(name) {
  rater = name;
  try {
    ballot = await (await ask("/ballot" + query({}))).json();
  } catch (error) {
    if (error.refused) close(error.message);
    else close("The server does not answer. Is it still running? Reload the page to try again.");
    return;
  }
  try { sessionStorage.setItem("rater", name); } catch { /* without storage a reload asks for the name */ }
  done = new Set(ballot.done);
  document.title = ballot.title;
  const keys = ballot.kind === "pairs" ? "1, 2, 3: left, alike, right." : "1 to 5: grade the marked row.";
  $("keys").textContent = `Keys: ${keys} Enter: next. Backspace: back. Tab: from row to row.`;
  count();
  open(unfinished(-1));
}

// The next task without all votes after a task, or the first one; ballot.tasks when there is none.
function unfinished(after) {
  for (let step = 1; step <= ballot.tasks; step++) {
    const number = (after + step) % ballot.tasks;
    if (!done.has(number)) return number;
  }
  return ballot.tasks;
}

async function open(number) {
  const mine = ++turn;
  if (number >= ballot.tasks) {
    current = null;
    show("end");
    $("end").querySelector("h1").focus();
    return;
  }
  try {
    const task = await (await ask("/task" + query({ task: number }))).json();
    // A vote that is still on its way is newer than what the server knows.
    for (const vote of unsent) if (vote.task === number) note(task, vote);
    const images = await Promise.all(Array.from({ length: task.images }, (_, place) =>
      ask("/image" + query({ task: number, place })).then((answer) => answer.blob())));
    if (mine !== turn) return;
    draw(task, images);
    say("");
  } catch (error) {
    if (mine !== turn) return;
    if (error.refused) return close(error.message);
    say("No answer from the server; trying again", true);
    setTimeout(() => { if (mine === turn) open(number); }, RETRY_MS);
  }
}

function note(task, vote) {
  task.votes[vote.question][vote.place || 0] = vote.value;
}

function make(tag, fields = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

function draw(task, images) {
  current = task;
  addresses.forEach(URL.revokeObjectURL);
  addresses = images.map((image) => URL.createObjectURL(image));
  $("prompt").textContent = task.prompt;
  const pairs = ballot.kind === "pairs";
  const figures = addresses.map((address, place) => {
    const name = pairs ? ["Left", "Right"][place] : "Image " + LETTERS[place];
    const image = make("img", { src: address, alt: name });
    image.onload = () => { if (image.naturalWidth < 200) image.className = "small"; };
    const frame = make("button", { className: "frame", type: "button", onclick: () => enlarge(address, name) }, image);
    frame.setAttribute("aria-label", "Enlarge " + name.toLowerCase());
    const figure = make("figure", {}, frame, make("figcaption", {}, name));
    if (!pairs) figure.append(...ballot.questions.map((question) => graded(task, question, place, name)));
    return figure;
  });
  $("images").replaceChildren(...figures);
  $("shared").replaceChildren(...(pairs ? ballot.questions.map((question) => compared(task, question)) : []));
  $("back").disabled = task.task === 0;
  show("task");
  update();
  const row = firstOpen();
  if (row) focusRow(row);
  else $("next").focus();
  scrollTo(0, 0);
}

function graded(task, question, place, name) {
  const values = [];
  for (let value = ballot.low; value <= ballot.high; value++) values.push([value, String(value)]);
  const set = choices(task, question, place, values, `${question.text}`, name);
  set.append(make("div", { className: "ends" }, make("span", {}, question.worst), make("span", {}, question.best)));
  return set;
}

function compared(task, question) {
  return choices(task, question, 0, [[0, "Left"], ["alike", "Alike"], [1, "Right"]], question.text, "");
}

function choices(task, question, place, values, text, name) {
  const group = `${question.name}-${place}`;
  const labels = values.map(([value, shown]) => {
    const input = make("input", { type: "radio", name: group, checked: task.votes[question.name][place] === value });
    if (name) input.setAttribute("aria-label", `${shown}, ${name}`);
    input.onchange = () => vote(task, question.name, place, value);
    return make("label", {}, input, make("span", {}, shown));
  });
  return make("fieldset", {}, make("legend", {}, text), make("div", { className: "choices" }, ...labels));
}

const rows = () => [...document.querySelectorAll("#task fieldset")];
const answered = (row) => row.querySelector(":checked") !== null;
const firstOpen = () => rows().find((row) => !answered(row));

function focusRow(row) {
  (row.querySelector(":checked") || row.querySelector("input")).focus({ preventScroll: false });
}

function update() {
  const all = !firstOpen();
  $("next").className = all ? "ready" : "";
  $("next").textContent = all ? "Next" : "Skip";
  if (all) done.add(current.task);
  count();
}

function vote(task, question, place, value) {
  note(task, { question, place, value });
  const record = { rater, task: task.task, question, value };
  if (ballot.kind === "grades") record.place = place;
  unsent.push(record);
  update();
  send();
}

async function send() {
  if (sending) return;
  sending = true;
  while (unsent.length) {
    try {
      await ask("/vote", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(unsent[0]) });
      unsent.shift();
      say("");
    } catch (error) {
      say(error.refused ? `Vote not taken: ${error.message}` : `${unsent.length} vote(s) not sent yet; trying again`, true);
      // What is refused once is refused again; keeping it would hold up the votes behind it.
      if (error.refused) unsent.shift();
      else await new Promise((wake) => setTimeout(wake, RETRY_MS));
    }
  }
  sending = false;
}

function enlarge(address, name) {
  $("large").src = address;
  $("large").alt = name;
  $("zoom").showModal();
}

const next = () => open(firstOpen() ? skip() : unfinished(current.task));
const skip = () => (current.task + 1 < ballot.tasks ? current.task + 1 : unfinished(-1));

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("zoom").open || $("task").hidden) return;
  const focused = document.activeElement;
  if (/^[1-9]$/.test(event.key)) {
    const row = focused.closest("fieldset") || firstOpen();
    const input = row && row.querySelectorAll("input")[Number(event.key) - 1];
    if (!input) return;
    event.preventDefault();
    input.click();
    const following = rows().slice(rows().indexOf(row) + 1).find((other) => !answered(other)) || firstOpen();
    if (following) focusRow(following);
    else $("next").focus();
  } else if (event.key === "Enter" && focused.tagName !== "BUTTON") {
    event.preventDefault();
    if (!firstOpen()) next();
  } else if (event.key === "Backspace") {
    event.preventDefault();
    $("back").click();
  }
}

$("next").onclick = next;
$("back").onclick = () => { if (current.task > 0) open(current.task - 1); };
$("again").onclick = () => open(0);
$("shrink").onclick = () => $("zoom").close();
$("zoom").onclick = (event) => { if (event.target === $("zoom")) $("zoom").close(); };
$("start").onsubmit = (event) => { event.preventDefault(); begin($("rater").value.trim()); };
addEventListener("keydown", key);
addEventListener("beforeunload", (event) => { if (unsent.length) event.preventDefault(); });

if (!token) close("The address of this page ends with # and a token, as it was printed where the page was started.");
else {
  let known = "";
  try { known = sessionStorage.getItem("rater") || ""; } catch { /* private windows may have none */ }
  $("about").textContent = "Images of several models for the same text, in an order that is drawn anew each time. Which model is which is not shown.";
  if (known) begin(known);
  else { show("start"); $("rater").focus(); }
}
