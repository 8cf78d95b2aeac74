// The page of `sightline serve`. Every number on it comes from the server; this file asks and draws.

// ---- Building blocks

const $ = (id) => document.getElementById(id);

/** An element. Attributes that are functions become event listeners; `false` and `null` leave an attribute out. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "title", "desc"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== false));
  return element;
}

let count = 0;
const unique = (name) => `${name}-${++count}`;

/** Never rounded to a certainty. */
function percent(share) {
  const text = share > 0.999 && share < 1 ? ">99.9" : share < 0.001 && share > 0 ? "<0.1" : (100 * share).toFixed(1);
  return `${text}\u202f%`;
}

function number(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size && (size < 0.001 || size >= 10000) ? value.toExponential(1) : value.toFixed(size < 10 ? 3 : 1);
  return text.replaceAll("-", "−");
}

function duration(seconds) {
  if (seconds < 1) return `${Math.max(0.01, seconds).toFixed(2)} s`;
  return seconds < 90 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${Math.round(seconds / 60)} min`;
}

const stem = (name) => name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "_") || "image";

/** For screen readers and eyes: what has just happened. */
function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("error").textContent = text;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal?.aborted) return stop();
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, 1000 * seconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), stop()), { once: true });
  });
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ---- The server

/** Asks until the queue has room; raises the server's own words. */
async function ask(path, options = {}, signal = options.signal) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer; is it still running?");
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    const seconds = Number(response.headers.get("Retry-After"));
    if (!seconds) throw new Error(said.error ?? `${response.status} ${response.statusText}`);
    say(`The server is busy. Trying again in ${seconds} s.`);
    await pause(seconds, signal);
  }
}

const get = async (path) => (await ask(path)).json();

const running = new Set();

/** The result of a job. `stop` cancels it here and on the server; `show` is told how far it is. */
async function job(body, { signal, show }) {
  const { id } = await (await ask("jobs", { method: "POST", body }, signal)).json();
  running.add(id);
  try {
    for (let wait = 0.1; ; wait = Math.min(1.4 * wait, 1)) {
      await pause(wait, signal);
      const now = await (await ask(`jobs/${id}`, { signal })).json();
      if (now.state === "done") {
        cancel(id);
        return now.result;
      }
      if (now.state === "failed") throw new Error(now.error);
      if (now.state === "cancelled") throw new DOMException("cancelled on the server", "AbortError");
      show(now);
    }
  } catch (error) {
    if (signal.aborted) cancel(id);
    throw error;
  } finally {
    running.delete(id);
  }
}

/** Cancels a job, or lets the server forget its result. */
function cancel(id) {
  fetch(`jobs/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

addEventListener("pagehide", () => running.forEach(cancel));

/** Runs `work({signal, show})` with a row that shows its progress and can cancel it; `work` may return what to say. */
async function task(title, work, stop = new AbortController()) {
  const bar = make("progress", { "aria-label": title });
  const detail = make("span", { class: "quiet" }, "starting");
  const button = make("button", { type: "button", click: () => stop.abort() }, "Cancel");
  button.setAttribute("aria-label", `Cancel: ${title}`);
  const row = make("li", {}, make("span", {}, title), bar, detail, button);
  const show = ({ state, what, done, total, left }) => {
    if (total && state === "running") bar.max = total;
    if (total && state === "running") bar.value = done;
    else bar.removeAttribute("value");
    const isKnown = left !== null && left !== undefined && done >= total / 20; // the first steps take longer
    const time = isKnown ? `, about ${duration(left)} left` : "";
    detail.textContent = state === "waiting" ? "waiting for its turn" : `${what || "running"}${time}`;
  };
  $("tasks").append(row);
  complain("");
  say(`Started: ${title}.`);
  try {
    const outcome = await work({ signal: stop.signal, show });
    say(outcome ?? `Finished: ${title}.`);
  } catch (error) {
    if (error.name === "AbortError") say(`Canceled: ${title}.`);
    else {
      say("");
      complain(error.message);
    }
  } finally {
    if (row.contains(document.activeElement)) $("maps-title").focus();
    row.remove();
  }
}

// ---- Settings

const network = { methods: [], classes: [] };
const target = { index: null };

const isControl = (name) => network.methods.some((method) => method.name === name && method.control);

function checkbox(method) {
  const box = make("input", { type: "checkbox", name: "methods", value: method.name });
  box.checked = method.name === network.chosen;
  return make("li", {}, make("label", { title: method.summary }, box, ` ${method.title}`));
}

function showMethods() {
  const fits = network.methods.filter((method) => method.works);
  const usual = fits.filter((method) => !method.control);
  network.chosen = (usual.find((method) => method.name === "grad_cam") ?? usual[0] ?? fits[0])?.name;
  const slow = usual.filter((method) => !method.fast);
  const unsuited = network.methods.filter((method) => !method.works);
  $("fast").append(...usual.filter((method) => method.fast).map(checkbox));
  $("controls").append(...fits.filter((method) => method.control).map(checkbox));
  $("slow").hidden = !slow.length;
  $("slow").querySelector("summary").textContent = `Slow: many passes (${slow.length})`;
  $("slow")
    .querySelector("ul")
    .append(...slow.map(checkbox));
  $("unsuited").hidden = !unsuited.length;
  $("unsuited").querySelector("summary").textContent = `Do not fit this network (${unsuited.length})`;
  $("unsuited")
    .querySelector("dl")
    .append(...unsuited.flatMap(({ title, reason }) => [make("dt", {}, title), make("dd", {}, reason ?? "")]));
}

function showLayers({ layers, default: usual }) {
  const option = ({ name, shape }) => make("option", { value: name }, `${name} (${shape.join(" x ")})`);
  $("layer").append(make("option", { value: "" }, `default: ${usual}`), ...layers.map(option));
}

/** What is set, for when the settings are folded. */
function summarize() {
  const boxes = [...$("settings").elements.methods].filter((box) => box.checked);
  const methods = boxes.map((box) => box.closest("label").textContent.trim());
  const shown = methods.length > 3 ? [...methods.slice(0, 2), `${methods.length - 2} more`] : methods;
  const of = target.index === null ? "the predicted class" : network.classes[target.index];
  $("chosen").textContent =
    `${shown.join(", ") || "no method"} · ${of}${$("layer").value ? ` · ${$("layer").value}` : ""}`;
}

const chosenMethods = () => [...$("settings").elements.methods].filter((box) => box.checked).map((box) => box.value);

/** A list of classes that narrows as one types: only what is shown is ever in the page. */
function combobox(input, list) {
  const most = 100;
  let active = -1;
  const options = () => [...list.querySelectorAll("[role=option]")];

  function choose(option) {
    target.index = option.dataset.index === "" ? null : Number(option.dataset.index);
    input.value = target.index === null ? "" : option.dataset.name;
    close();
    summarize();
  }

  function move(to) {
    const all = options();
    active = all.length ? (to + all.length) % all.length : -1;
    all.forEach((option, i) => option.setAttribute("aria-selected", i === active));
    if (active < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", all[active].id);
    all[active].scrollIntoView({ block: "nearest" });
  }

  /** Classes with this number, this word, this start, a word that starts so, or this anywhere: in this order. */
  function matching(text) {
    const wanted = text.trim().toLowerCase();
    const rank = (name, index) => {
      const words = name.toLowerCase().split(/[\s_,()-]+/);
      if (String(index) === wanted || name.toLowerCase() === wanted) return 0;
      if (words.includes(wanted)) return 1;
      if (name.toLowerCase().startsWith(wanted)) return 2;
      if (words.some((word) => word.startsWith(wanted))) return 3;
      return name.toLowerCase().includes(wanted) ? 4 : 5;
    };
    const ranked = network.classes.map((name, index) => ({ name, index, rank: wanted ? rank(name, index) : 0 }));
    return ranked.filter((one) => one.rank < 5).sort((a, b) => a.rank - b.rank || a.index - b.index);
  }

  function open(text) {
    const found = matching(text);
    const option = (index, name, ...shown) =>
      make(
        "li",
        {
          role: "option",
          id: `target-${index === "" ? "predicted" : index}`,
          "data-index": index,
          "data-name": name,
          "aria-selected": "false",
          mousedown: (event) => event.preventDefault(),
          click: (event) => choose(event.currentTarget),
        },
        shown,
      );
    list.replaceChildren(
      ...(text ? [] : [option("", "", "the predicted class")]),
      ...found.slice(0, most).map(({ name, index }) => option(String(index), name, name, make("small", {}, index))),
    );
    if (found.length > most) {
      list.append(make("li", { role: "presentation", class: "quiet" }, `${found.length - most} more: type to narrow`));
    }
    if (text)
      say(
        found.length ? `${found.length} ${found.length === 1 ? "class" : "classes"}` : "No class has this in its name.",
      );
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    move(text && found.length ? 0 : -1);
  }

  function close() {
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  input.addEventListener("input", () => {
    target.index = null;
    input.removeAttribute("aria-invalid");
    open(input.value);
  });
  input.addEventListener("click", () => list.hidden && open(""));
  input.addEventListener("blur", () => {
    if (active >= 0 && input.value) choose(options()[active]);
    close();
  });
  input.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1 };
    if (event.key in steps) {
      event.preventDefault();
      if (list.hidden) open("");
      move(active < 0 && steps[event.key] < 0 ? -1 : active + steps[event.key]);
    } else if (event.key === "Enter" && !list.hidden) {
      event.preventDefault();
      if (active >= 0) choose(options()[active]);
    } else if (event.key === "Escape" && !list.hidden) {
      event.preventDefault();
      if (target.index === null) input.value = "";
      close();
    }
  });
}

// ---- Images and their maps

const cards = [];
const explaining = new Set();

/** The fields of a request about one image. */
function fields(card, { methods, index, layer } = {}) {
  const body = new FormData();
  if (card.file) body.set("images", card.file, card.name);
  else body.set("sample", card.sample);
  for (const method of methods ?? []) body.append("methods", method);
  if (index !== null && index !== undefined) body.set("target", index);
  if (layer) body.set("layer", layer);
  return body;
}

/** Files are read at once, so that they may change or go afterwards. */
async function add(files) {
  const read = async (file) => ({ name: file.name || "pasted image", file: new Blob([await file.arrayBuffer()]) });
  const names = [...files].map((file) => file.name);
  const contents = await Promise.allSettled([...files].map(read));
  const images = contents.flatMap(({ value }) => (value ? [newCard(value)] : []));
  if (images.length) explain(images);
  const unread = names.filter((_, i) => !contents[i].value);
  if (unread.length) complain(`${unread.join(", ")} cannot be read: drop image files, not folders.`);
}

function newCard(card) {
  card.element = make("article", { class: "card", "aria-labelledby": unique("card") });
  const remove = make("button", { type: "button", click: () => drop(card) }, "Remove");
  remove.setAttribute("aria-label", `Remove ${card.name}`);
  card.body = make("div", {}, make("p", { class: "quiet" }, "No maps yet."));
  card.element.append(
    make("header", {}, make("h3", { id: card.element.getAttribute("aria-labelledby") }, card.name), remove),
    card.body,
  );
  cards.push(card);
  $("cards").append(card.element);
  update();
  return card;
}

function drop(card) {
  const at = cards.indexOf(card);
  cards.splice(at, 1);
  card.element.remove();
  update();
  const next = cards[Math.min(at, cards.length - 1)];
  (next?.element.querySelector("header button") ?? $("files")).focus();
}

function update() {
  $("empty").hidden = cards.length > 0;
  $("opacity-label").hidden = !cards.some((card) => card.result);
  $("explain").disabled = !cards.length;
  document.body.classList.toggle("used", cards.length > 0);
}

async function explain(images) {
  const asked = { methods: chosenMethods(), index: target.index, layer: $("layer").value };
  if (!asked.methods.length) return complain("Choose at least one method or control.");
  if (asked.index === null && $("target").value.trim()) {
    $("target").setAttribute("aria-invalid", "true");
    return complain(`No class is called “${$("target").value.trim()}”: choose one from the list, or empty the field.`);
  }
  const stop = new AbortController();
  explaining.add(stop);
  const title = images.length === 1 ? `maps of ${images[0].name}` : `maps of ${images.length} images`;
  await task(
    title,
    async ({ signal, show }) => {
      const faults = [];
      for (const [i, card] of images.entries()) {
        if (!cards.includes(card)) continue;
        const of = images.length > 1 ? `image ${i + 1} of ${images.length}: ` : "";
        card.element.setAttribute("aria-busy", "true");
        try {
          const body = fields(card, asked);
          body.set("kind", "explain");
          const result = await job(body, {
            signal,
            show: (now) => show({ ...now, what: `${of}${now.what ?? ""}` }),
          });
          if (cards.includes(card)) showResult(card, result, asked);
        } catch (error) {
          if (error.name === "AbortError") throw error;
          faults.push(error.message);
          if (!card.result) card.body.replaceChildren(make("p", { class: "wrong" }, error.message));
        } finally {
          card.element.removeAttribute("aria-busy");
        }
      }
      if (faults.length) throw new Error([...new Set(faults)].join(" "));
      const [only] = images;
      if (images.length > 1 || !only.result) return;
      const [best] = only.result.prediction;
      return `${only.name}: ${best.class}, ${percent(best.probability)}.`;
    },
    stop,
  );
  explaining.delete(stop);
}

function showResult(card, result, asked) {
  const [image] = result.images;
  card.result = image;
  card.asked = asked;
  card.code = result.code;
  card.scale = result.scale;
  notify(result.notices);
  for (const [name, colors] of [
    ["--colors", card.scale.colors],
    ["--signed", card.scale.signed],
  ]) {
    document.documentElement.style.setProperty(name, `linear-gradient(90deg, ${colors.join(", ")})`);
  }
  const methods = image.maps.filter((map) => !isControl(map.method));
  const controls = image.maps.filter((map) => isControl(map.method));
  const seen = make(
    "li",
    {},
    make("div", { class: "sight", role: "img", "aria-label": image.name }, picture(image.shown, image)),
    make("p", { class: "name" }, make("b", {}, "image")),
    predictions(image.prediction),
  );
  card.body.replaceChildren(
    make("p", { class: "answer" }, answers(card, image)),
    make(
      "div",
      { class: "row" },
      tiles([seen, ...methods.map((map) => tile(image, map))]),
      controls.length > 0 &&
        make("div", { class: "apart" }, make("h4", {}, "Controls"), tiles(controls.map((map) => tile(image, map)))),
    ),
    actions(card),
  );
  update();
}

/** The class that is explained and, of a test image, the true one. */
function answers({ label }, { target, prediction: [best] }) {
  const explained = make("span", {}, "explained ", make("b", {}, target.class), ` ${percent(target.probability)}`);
  if (!label) return [explained];
  const isRight = label === best.class;
  const verdict = make("span", { class: isRight ? "right" : "wrong" }, isRight ? "✓ correct" : "✗ wrong");
  return [make("span", {}, "true ", make("b", {}, label)), explained, verdict];
}

/** Decisions about the images and the model that one may want to change, each once. */
function notify(notices) {
  const list = $("notices").querySelector("ul");
  const told = new Set([...list.children].map((one) => one.textContent));
  list.append(...notices.filter((notice) => !told.has(notice)).map((notice) => make("li", {}, notice)));
  const count = list.children.length;
  $("notices").hidden = !count;
  $("notices").querySelector("summary").textContent = count === 1 ? "1 notice" : `${count} notices`;
}

function tiles(items) {
  const list = make("ul", { class: "tiles" }, items);
  list.style.setProperty("--tiles", items.length);
  return list;
}

const picture = (url, { size }, kind = "") =>
  make("img", { src: url, alt: "", class: `${kind} ${Math.max(...size) < 96 ? "pixels" : ""}`.trim() || null });

function predictions(rows) {
  const row = (one) => {
    const bar = make("i", { "aria-hidden": "true" });
    bar.style.setProperty("--share", `${100 * one.probability}%`);
    return make("li", {}, make("span", {}, one.class), make("span", {}, percent(one.probability)), bar);
  };
  return make("ol", { class: "prediction", "aria-label": "Prediction" }, rows.map(row));
}

function tile(image, map) {
  const verdict = ({ level, text }) =>
    make(
      "span",
      { class: level.replaceAll(" ", "-"), title: level },
      level === "do not read" ? `do not read: ${text}` : text,
    );
  const verdicts = [
    ...map.verdicts.map(verdict),
    ...(map.unchecked ? [make("span", { class: "note" }, "not compared with another class")] : []),
  ];
  if (!verdicts.length && !isControl(map.method)) verdicts.push(make("span", { class: "note" }, "checks passed"));
  const shared = image.maps.length > 1 ? `${duration(map.seconds)} for all` : duration(map.seconds);
  return make(
    "li",
    { "data-method": map.method },
    make(
      "div",
      { class: "sight", role: "img", "aria-label": `${map.title} of ${image.name}: ${map.text}` },
      picture(image.shown, image),
      picture(map.color, image, "map"),
    ),
    make(
      "p",
      { class: "name" },
      make("b", {}, map.title),
      verdicts.flatMap((one) => [" ", one]),
    ),
    make(
      "p",
      { class: "bar" },
      make("span", {}, number(map.low)),
      make("i", { class: map.low === map.high ? "flat" : map.signed ? "signed" : null }),
      make("span", {}, number(map.high)),
    ),
    make(
      "p",
      { class: "range" },
      [map.layer, `${map.positions.join(" x ")} positions`, shared].filter(Boolean).join(" · "),
    ),
  );
}

/** Buttons under the maps of one image, some with a part that they open. */
function actions(card) {
  const parts = [];
  const newPart = () => make("div", { id: unique("part"), class: "part", hidden: true });
  function opens(text, build, part = newPart()) {
    const expanded = String(!part.hidden);
    const button = make("button", { type: "button", "aria-expanded": expanded, "aria-controls": part.id }, text);
    button.addEventListener("click", () => {
      part.hidden = !part.hidden;
      button.setAttribute("aria-expanded", String(!part.hidden));
      if (!part.hidden && !part.hasChildNodes()) build(part);
    });
    parts.push(part);
    return button;
  }
  const simple = (text, click) => make("button", { type: "button", click }, text);
  const buttons = [
    opens("Measure these maps", (part) => measure(card, part)),
    opens("Hide what I brush over", (part) => brush(card, part), (card.brush ??= newPart())),
    opens("Python", (part) => python(card, part)),
    simple("Save as PNG", async () => save(await drawn(card), `${stem(card.name)}--page.png`)),
    simple("Save raw maps (.npz)", () => saveRaw(card)),
  ];
  const group = make("div", { class: "actions", role: "group", "aria-label": `What to do with ${card.name}` }, buttons);
  return make("div", {}, group, parts);
}

/** The raw maps as `sightline explain` writes them. */
function saveRaw(card) {
  const arrays = card.result.maps.flatMap(({ method, values, shape, parts }) => [
    [method, values, shape],
    ...(parts ? [[`${method} parts`, parts.values, parts.shape]] : []),
  ]);
  save(zip(arrays.map(([name, values, shape]) => [`${name}.npy`, npy(values, shape)])), `${stem(card.name)}.npz`);
}

/** A file of NumPy: the header, padded to a multiple of 64 bytes, then float32 values. */
function npy(values, shape) {
  const described = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const header = `${described.padEnd(64 * Math.ceil((described.length + 11) / 64) - 11)}\n`;
  const start = [
    0x93,
    ...[..."NUMPY"].map((letter) => letter.charCodeAt(0)),
    1,
    0,
    header.length & 255,
    header.length >> 8,
  ];
  const bytes = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  return new Uint8Array([...start, ...bytes(header), ...bytes(atob(values))]);
}

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

/** Files in an archive, not compressed. */
function zip(files) {
  const little = (value, size) => Array.from({ length: size }, (_, i) => Math.floor(value / 256 ** i) & 255);
  const [parts, index] = [[], []];
  let offset = 0;
  for (const [name, bytes] of files) {
    const letters = new TextEncoder().encode(name);
    const facts = [20, 0x800, 0, 0, 0x21].flatMap((value) => little(value, 2));
    facts.push(
      ...[crc32(bytes), bytes.length, bytes.length].flatMap((value) => little(value, 4)),
      ...little(letters.length, 2),
      0,
      0,
    );
    const head = new Uint8Array([0x50, 0x4b, 3, 4, ...facts, ...letters]);
    index.push(new Uint8Array([0x50, 0x4b, 1, 2, 20, 0, ...facts, ...little(0, 10), ...little(offset, 4), ...letters]));
    parts.push(head, bytes);
    offset += head.length + bytes.length;
  }
  const length = index.reduce((sum, part) => sum + part.length, 0);
  const counts = [0, 0, files.length, files.length].flatMap((value) => little(value, 2));
  return new Blob([
    ...parts,
    ...index,
    new Uint8Array([0x50, 0x4b, 5, 6, ...counts, ...little(length, 4), ...little(offset, 4), 0, 0]),
  ]);
}

function python(card, part) {
  const code = make("code", {}, card.code);
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    if (navigator.clipboard) await navigator.clipboard.writeText(card.code);
    else {
      getSelection().selectAllChildren(code); // a page that did not come over HTTPS has no clipboard
      document.execCommand("copy");
    }
    say("Copied.");
  });
  part.append(
    make("p", { class: "quiet" }, "These lines make the same maps."),
    make("pre", { tabindex: "0", role: "region", "aria-label": "Python" }, code),
    button,
  );
}

// ---- Measures of one image

async function measure(card, part) {
  const methods = card.result.maps.map((map) => map.method).filter((method) => !isControl(method));
  if (!methods.length) return part.append(make("p", {}, "Choose a method that is no control, and explain again."));
  const body = fields(card, { ...card.asked, methods, index: card.result.target.index });
  body.set("kind", "measure");
  part.append(make("p", { class: "quiet" }, "Measuring …"));
  await task(`measures of ${card.name}`, async ({ signal, show }) => {
    showMeasures(part, await job(body, { signal, show }), card);
  });
  if (!part.querySelector("table")) {
    part.replaceChildren(); // so that opening it again tries again
    part.hidden = true;
    card.element.querySelector(`[aria-controls="${part.id}"]`).setAttribute("aria-expanded", "false");
  }
}

const EXPECTED = {
  insertion: "The earlier a line rises, the better its map has found what the model needs.",
  deletion: "The earlier a line falls, the better its map has found what the model needs.",
};
const AXES = { insertion: "pixels restored", deletion: "pixels removed" };

function showMeasures(part, { curves, note }, card) {
  const metrics = ["insertion", "deletion"].filter((metric) => curves.some((curve) => curve.metric === metric));
  const names = [...new Map(curves.map(({ method, title, control }) => [method, { method, title, control }])).values()];
  const methods = names.filter((one) => !one.control);
  const kind = ({ method, control }) =>
    control ? "thin" : `line series-${1 + (methods.findIndex((one) => one.method === method) % 6)}`;
  const sample = (one) =>
    make(
      "svg",
      { viewBox: "0 0 30 10", width: 30, height: 10, "aria-hidden": "true", focusable: "false" },
      make("line", { class: kind(one), x1: 1, x2: 29, y1: 5, y2: 5 }),
    );
  const legend = [
    ...methods.map((one) => make("li", {}, sample(one), one.title)),
    make("li", {}, sample({ control: true }), "controls"),
  ];
  const area = (method, metric) => curves.find((one) => one.method === method && one.metric === metric)?.area ?? null;
  const rows = (title, group) =>
    make(
      "tbody",
      {},
      make("tr", { class: "group" }, make("th", { scope: "rowgroup", colspan: 1 + metrics.length }, title)),
      group.map((one) =>
        make(
          "tr",
          {},
          make("th", { scope: "row" }, one.title),
          metrics.map((metric) => make("td", { class: "count" }, number(area(one.method, metric)))),
        ),
      ),
    );
  const better = { insertion: "↑ higher is better", deletion: "↓ lower is better" };
  part.replaceChildren(
    make("p", { class: "quiet" }, `Score of ${card.result.target.class} · ${note}`),
    make("ul", { class: "legend" }, legend),
    make(
      "div",
      { class: "charts" },
      metrics.map((metric) =>
        chart(
          metric,
          curves.filter((curve) => curve.metric === metric),
          kind,
        ),
      ),
    ),
    make(
      "table",
      {},
      make("caption", {}, "Area under each curve"),
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          make("th", { scope: "col" }, "map"),
          metrics.map((metric) =>
            make("th", { scope: "col", class: "count" }, metric, make("small", {}, better[metric])),
          ),
        ),
      ),
      rows("Methods", methods),
      rows(
        "Controls",
        names.filter((one) => one.control),
      ),
    ),
  );
}

function chart(metric, curves, kind) {
  const [width, height] = [400, 200];
  const scores = curves.flatMap((curve) => curve.scores).filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...scores), Math.max(1, ...scores)];
  const x = (share) => (width * share).toFixed(1);
  const y = (score) => (height * (1 - (score - low) / (high - low))).toFixed(1);
  const path = ({ shares, scores }) => shares.map((share, i) => `${i ? "L" : "M"}${x(share)} ${y(scores[i])}`).join("");
  const [title, text] = [unique("chart"), unique("chart")];
  const words = ({ title, scores, area }) =>
    `${title} from ${number(scores[0])} to ${number(scores.at(-1))}, area ${number(area)}`;
  const name = metric[0].toUpperCase() + metric.slice(1);
  const svg = make(
    "svg",
    { class: "chart", viewBox: "-52 -12 476 262", role: "img", "aria-labelledby": `${title} ${text}` },
    make("title", { id: title }, name),
    make("desc", { id: text }, curves.map(words).join("; ")),
    [0, 0.25, 0.5, 0.75, 1].flatMap((share) => {
      const score = low + share * (high - low);
      return [
        make("line", { class: "grid", x1: 0, x2: width, y1: y(score), y2: y(score) }),
        make("text", { x: -8, y: Number(y(score)) + 4, "text-anchor": "end" }, score.toFixed(2)),
        make("text", { x: x(share), y: height + 20, "text-anchor": "middle" }, `${100 * share} %`),
      ];
    }),
    make("text", { x: width, y: height + 42, "text-anchor": "end" }, AXES[metric]),
    [...curves]
      .sort((a, b) => b.control - a.control)
      .map((curve) => make("path", { class: kind(curve), d: path(curve) }, make("title", {}, curve.title))),
  );
  return make("figure", {}, make("figcaption", {}, make("b", {}, `${name}. `), EXPECTED[metric]), svg);
}

// ---- Hide what is brushed over

function brush(card, part) {
  const [height, width] = card.result.size;
  const long = Math.max(height, width);
  const enlarged = Math.max(1, Math.ceil(512 / long));
  const mask = make("canvas", { width, height });
  const shown = make("canvas", {
    width: enlarged * width,
    height: enlarged * height,
    tabindex: "0",
    role: "application",
    "aria-roledescription": "brush",
    "aria-label": `Brush over ${card.name}`,
  });
  const help = make("p", { id: unique("help"), class: "quiet" });
  help.textContent =
    "Paint with mouse or finger. With the keyboard: arrow keys move the brush (with Shift in small steps), Space hides, Delete uncovers.";
  shown.setAttribute("aria-describedby", help.id);
  const size = make("input", { type: "range", min: 1, max: 30, value: 10 });
  const erase = make("input", { type: "checkbox" });
  const fill = make(
    "select",
    {},
    make("option", { value: "blur" }, "blurred"),
    make("option", { value: "mean" }, "the mean color"),
  );
  const outcome = make("div", { class: "outcome" });
  const cursor = { x: width / 2, y: height / 2, visible: false };
  const pen = mask.getContext("2d");
  const view = shown.getContext("2d");
  const radius = () => Math.max(0.5, (size.value / 200) * long);
  let request = null;
  let timer = null;

  function redraw() {
    view.clearRect(0, 0, shown.width, shown.height);
    view.imageSmoothingEnabled = false;
    view.globalAlpha = 0.75;
    view.drawImage(mask, 0, 0, shown.width, shown.height);
    view.globalAlpha = 1;
    if (!cursor.visible) return;
    for (const [color, line] of [
      ["#000", 5],
      ["#fff", 2],
    ]) {
      view.beginPath();
      view.arc(enlarged * cursor.x, enlarged * cursor.y, enlarged * radius(), 0, 2 * Math.PI);
      view.strokeStyle = color;
      view.lineWidth = (line * shown.width) / (shown.clientWidth || shown.width);
      view.stroke();
    }
  }

  /** A stroke to the cursor, from where it was or from itself. */
  function stroke(from = cursor, erases = erase.checked) {
    pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
    pen.strokeStyle = "#fff";
    pen.lineCap = "round";
    pen.lineWidth = 2 * radius();
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(cursor.x + 1e-3, cursor.y);
    pen.stroke();
    redraw();
    clearTimeout(timer);
    timer = setTimeout(predict, 300);
  }

  async function predict() {
    request?.abort();
    const stop = (request = new AbortController());
    const body = fields(card);
    const solid = make("canvas", { width, height });
    const ink = solid.getContext("2d");
    ink.fillRect(0, 0, width, height);
    ink.drawImage(mask, 0, 0);
    body.set("mask", await new Promise((resolve) => solid.toBlob(resolve, "image/png")), "mask.png");
    body.set("fill", fill.value);
    outcome.setAttribute("aria-busy", "true");
    try {
      const answer = await (await ask("predict", { method: "POST", body, signal: stop.signal })).json();
      showChange(outcome, answer);
      const [first] = answer.after;
      say(`${percent(answer.hidden)} of the image is hidden. Now: ${first.class}, ${percent(first.probability)}.`);
      complain("");
    } catch (error) {
      if (error.name !== "AbortError") complain(error.message);
    } finally {
      if (request === stop) outcome.removeAttribute("aria-busy");
    }
  }

  function clear() {
    pen.clearRect(0, 0, width, height);
    clearTimeout(timer);
    request?.abort();
    outcome.replaceChildren(make("p", { class: "quiet" }, "Nothing is hidden."));
    redraw();
    say("Nothing is hidden.");
  }

  const at = (event) => {
    const box = shown.getBoundingClientRect();
    return { x: ((event.clientX - box.x) / box.width) * width, y: ((event.clientY - box.y) / box.height) * height };
  };
  let painting = false;
  shown.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    shown.setPointerCapture(event.pointerId);
    painting = true;
    Object.assign(cursor, at(event));
    stroke();
  });
  shown.addEventListener("pointermove", (event) => {
    const from = { ...cursor };
    Object.assign(cursor, at(event), { visible: true });
    if (painting) stroke(from);
    else redraw();
  });
  for (const end of ["pointerup", "pointercancel"]) shown.addEventListener(end, () => (painting = false));
  for (const [event, visible] of [
    ["pointerleave", false],
    ["focus", true],
    ["blur", false],
  ]) {
    shown.addEventListener(event, () => {
      cursor.visible = visible;
      redraw();
    });
  }
  shown.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    cursor.visible = true;
    if (event.key in moves) {
      const step = radius() * (event.shiftKey ? 0.25 : 1);
      const [x, y] = moves[event.key];
      cursor.x = Math.min(width, Math.max(0, cursor.x + step * x));
      cursor.y = Math.min(height, Math.max(0, cursor.y + step * y));
      redraw();
      const [right, down] = [cursor.x / width, cursor.y / height].map((share) => Math.round(100 * share));
      say(`${right}\u202f% from the left, ${down}\u202f% from the top`);
    } else if (event.key === " ") stroke(cursor, false);
    else if (event.key === "Delete" || event.key === "Backspace") stroke(cursor, true);
    else return;
    event.preventDefault();
  });
  size.addEventListener("input", redraw);
  fill.addEventListener("change", () => outcome.querySelector("table") && predict());
  const ground = picture(card.result.shown, card.result);
  part.append(
    make("div", { class: "brushed" }, make("div", { class: "sight" }, ground, shown), outcome),
    help,
    make(
      "div",
      { class: "actions" },
      make("label", {}, "Brush size ", size),
      make("label", {}, erase, " Uncover"),
      make("label", {}, "Hidden parts are ", fill),
      make("button", { type: "button", click: clear }, "Clear"),
    ),
  );
  outcome.append(make("p", { class: "quiet" }, "Nothing is hidden."));
}

function showChange(outcome, { before, after, hidden }) {
  const later = new Map(after.map((one) => [one.index, one]));
  const earlier = new Map(before.map((one) => [one.index, one]));
  const all = [...new Map([...before, ...after].map((one) => [one.index, one])).values()];
  const cell = (one) => make("td", { class: "count" }, one ? percent(one.probability) : "–");
  outcome.replaceChildren(
    make(
      "table",
      {},
      make("caption", {}, `Prediction with ${percent(hidden)} of the image hidden`),
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          ["class", "before", "now"].map((name, i) => make("th", { scope: "col", class: i && "count" }, name)),
        ),
      ),
      make(
        "tbody",
        {},
        all.map(({ index, class: name }) =>
          make("tr", {}, make("th", { scope: "row" }, name), cell(earlier.get(index)), cell(later.get(index))),
        ),
      ),
    ),
  );
}

// ---- The maps of one image as one picture

async function drawn(card) {
  const [side, gap, scale, line] = [240, 20, 2, 18];
  const image = card.result;
  const load = async (url) => {
    const one = new Image();
    one.src = url;
    await one.decode();
    return one;
  };
  const photo = await load(image.shown);
  const colors = await Promise.all(image.maps.map((map) => load(map.color)));
  const styles = getComputedStyle(document.documentElement);
  const color = (name) => styles.getPropertyValue(name).trim();
  const opacity = $("opacity").value / 100;
  const columns = Math.min(4, 1 + image.maps.length);
  const high = (side * image.size[0]) / image.size[1];
  const canvas = make("canvas");
  const pen = canvas.getContext("2d");
  const font = (weight, size) => `${weight} ${size}px system-ui, sans-serif`;

  /** Words in lines that are no wider than `width`. */
  function wrapped(text, width) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (pen.measureText(longer).width <= width || !lines.at(-1)) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines;
  }
  function colorBar(map, left, base) {
    const [low, high] = [map.low, map.high].map(number);
    const [before, after] = [low, high].map((text) => pen.measureText(text).width + 6);
    const colors = map.signed ? card.scale.signed : card.scale.colors;
    const gradient = pen.createLinearGradient(left + before, 0, left + side - after, 0);
    colors.forEach((one, i) => gradient.addColorStop(i / (colors.length - 1), one));
    pen.fillText(low, left, base);
    pen.fillText(high, left + side - after + 6, base);
    pen.fillStyle = map.low === map.high ? "rgb(128 128 128)" : gradient;
    pen.fillRect(left + before, base - 9, side - before - after, 9);
  }
  pen.font = font(400, 13);
  const captions = [
    image.prediction.map((one) => `${one.class} ${percent(one.probability)}`),
    ...image.maps.map((map) => [
      map.title + (isControl(map.method) ? " (control)" : ""),
      "", // the color bar
      [map.layer, `${map.positions.join(" x ")} positions`].filter(Boolean).join(" · "),
      ...map.verdicts.map(({ level, text }) => (level === "do not read" ? `do not read: ${text}` : text)),
    ]),
  ].map((texts) => texts.flatMap((text) => wrapped(text, side)));
  const rows = Math.ceil(captions.length / columns);
  const heights = Array.from({ length: rows }, (_, row) => {
    const lines = Math.max(...captions.slice(row * columns, (row + 1) * columns).map((texts) => texts.length));
    return high + line * lines + gap;
  });
  canvas.width = scale * (columns * (side + gap) + gap);
  canvas.height = scale * (heights.reduce((a, b) => a + b, 0) + 3 * gap);
  pen.scale(scale, scale);
  pen.fillStyle = color("--paper");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = color("--ink");
  pen.font = font(600, 15);
  pen.fillText(
    `${image.name}: ${image.target.class} ${percent(image.target.probability)}`,
    gap,
    1.6 * gap,
    canvas.width / scale - 2 * gap,
  );
  captions.forEach((texts, i) => {
    const left = gap + (i % columns) * (side + gap);
    const top = 2.5 * gap + heights.slice(0, Math.floor(i / columns)).reduce((a, b) => a + b, 0);
    pen.imageSmoothingEnabled = Math.max(...image.size) >= 96;
    pen.drawImage(photo, left, top, side, high);
    pen.globalAlpha = opacity;
    if (i) pen.drawImage(colors[i - 1], left, top, side, high);
    pen.globalAlpha = 1;
    texts.forEach((text, row) => {
      pen.font = font(row ? 400 : 600, 13);
      pen.fillStyle = color(row ? "--quiet" : "--ink");
      pen.fillText(text, left, top + high + line * (row + 1), side);
    });
    if (i) colorBar(image.maps[i - 1], left, top + high + line * (texts.indexOf("") + 1));
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// ---- The page

function showOpacity() {
  document.documentElement.style.setProperty("--opacity", $("opacity").value / 100);
  $("opacity").nextElementSibling.value = `${$("opacity").value}\u202f%`;
  $("opacity").setAttribute("aria-valuetext", `${$("opacity").value}\u202f%`);
}

function showSamples(samples) {
  $("samples").hidden = !samples.length;
  $("samples")
    .querySelector("ul")
    .append(
      ...samples.map(({ index, name, class: label }) => {
        const click = () => explain([newCard({ name, sample: index, label })]);
        const image = make("img", { src: `samples/${index}`, alt: name, loading: "lazy", width: 72, height: 72 });
        return make("li", {}, make("button", { type: "button", click }, image, make("small", {}, label ?? "")));
      }),
    );
}

function takeImages() {
  $("files").addEventListener("change", () => {
    add($("files").files);
    $("files").value = "";
  });
  document.addEventListener("paste", (event) => event.clipboardData.files.length && add(event.clipboardData.files));
  const over = (on) => document.body.classList.toggle("over", on);
  document.addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || over(false));
  document.addEventListener("drop", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    over(false);
    add(event.dataTransfer.files);
  });
}

async function start() {
  if (matchMedia("(max-width: 52rem)").matches) $("settings").querySelector("details").open = false;
  showOpacity();
  $("opacity").addEventListener("input", showOpacity);
  $("settings").addEventListener("change", summarize);
  $("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    explaining.forEach((stop) => stop.abort());
    explain([...cards]);
  });
  try {
    const [{ methods }, layers, { classes }, { samples }] = await Promise.all(
      ["methods", "layers", "classes", "samples"].map(get),
    );
    Object.assign(network, { methods, classes });
    showMethods();
    showLayers(layers);
    combobox($("target"), $("target-list"));
    summarize();
    showSamples(samples);
    takeImages();
  } catch (error) {
    complain(error.message);
  }
}

start();
