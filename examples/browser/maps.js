// Runs a file of `sightline export --maps` in the browser and draws its map over a photo.
"use strict";

const byId = (id) => document.getElementById(id);
const INFERNO = [
  [0, 0, 4], [33, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84], [228, 90, 49], [249, 142, 9], [249, 203, 53],
  [252, 255, 164],
];
const RED_BLUE = [
  [5, 48, 97], [42, 113, 178], [107, 172, 209], [194, 221, 236], [247, 246, 246], [251, 204, 180], [228, 128, 102],
  [186, 40, 50], [103, 0, 31],
];

let session = null, facts = null, photo = null, answer = null;

// A .onnx file is a protocol buffer: field 14 of its outermost message holds the metadata, as pairs of texts.
function* fieldsOf(bytes) {
  let place = 0;
  const number = () => {
    let value = 0, factor = 1, byte;
    do {
      byte = bytes[place++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte > 127);
    return value;
  };
  while (place < bytes.length) {
    const key = number(), kind = key % 8;
    if (kind === 0) number();
    else if (kind === 1) place += 8;
    else if (kind === 5) place += 4;
    else if (kind === 2) {
      const size = number();
      yield [Math.floor(key / 8), bytes.subarray(place, place + size)];
      place += size;
    } else throw new Error("this is no .onnx file");
  }
}

function metadataOf(bytes) {
  const texts = {}, decoder = new TextDecoder();
  for (const [field, value] of fieldsOf(bytes)) {
    if (field !== 14) continue;
    const pair = Object.fromEntries(fieldsOf(value));
    texts[decoder.decode(pair[1])] = JSON.parse(decoder.decode(pair[2]));
  }
  if (!texts.preprocess || !texts.layers) throw new Error("expected a file of `sightline export --maps`");
  return texts;
}

async function openModel(buffer) {
  const metadata = metadataOf(new Uint8Array(buffer));
  session = await ort.InferenceSession.create(buffer, { executionProviders: ["wasm"] });
  [facts, answer] = [metadata, null];
  byId("map").replaceChildren(...facts.outputs.slice(1).map((name) => new Option(name)));
  byId("classes").hidden = facts.targets === "predicted";
  await run();
}

async function openPhoto(blob) {
  photo = await createImageBitmap(blob);
  await run();
}

// The whole photo, squeezed to the network's size: red, green, blue, one plane after the other.
function pixelsOf(picture, height, width) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), pixels = new Uint8Array(3 * height * width);
  for (let i = 0; i < height * width; i++) for (let c = 0; c < 3; c++) pixels[c * height * width + i] = data[4 * i + c];
  return pixels;
}

function softmax(logits) {
  if (logits.length === 1) return [1 / (1 + Math.exp(logits[0])), 1 / (1 + Math.exp(-logits[0]))];
  const highest = Math.max(...logits), powers = logits.map((value) => Math.exp(value - highest));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((value) => value / sum);
}

const nameOf = (index) => facts.classes[index] ?? `class ${index}`;

async function run(target = null) {
  if (!session || !photo) return;
  const [height, width] = facts.preprocess.size, inputs = {};
  inputs.images = new ort.Tensor("uint8", pixelsOf(photo, height, width), [1, 3, height, width]);
  if (facts.targets === "input") inputs.targets = new ort.Tensor("int64", BigInt64Array.of(BigInt(target ?? 0)), [1]);
  answer = await session.run(inputs);
  const chances = softmax(Array.from(answer.logits.data));
  const best = chances.indexOf(Math.max(...chances));
  if (target === null) {
    byId("class").replaceChildren(...chances.map((_, index) => new Option(nameOf(index), index)));
    byId("class").value = best;
    if (facts.targets === "input" && best !== 0) return run(best);
  }
  byId("answer").textContent = `${nameOf(best)}, ${(100 * chances[best]).toFixed(1)} %`;
  draw();
}

function colorOf(value, palette) {
  const place = Math.min(Math.max(value, 0), 1) * (palette.length - 1), low = Math.min(Math.floor(place), palette.length - 2);
  return palette[low].map((start, c) => start + (palette[low + 1][c] - start) * (place - low));
}

// The map from its lowest to its highest value; a signed one with 0 in the middle.
function draw() {
  const name = byId("map").value, isSigned = facts.signed.includes(name), output = answer[name];
  const [, targets, height, width] = output.dims, cells = height * width;
  const row = targets > 1 ? Number(byId("class").value) : 0;
  const values = Array.from(output.data.subarray(row * cells, (row + 1) * cells));
  const high = isSigned ? Math.max(...values.map(Math.abs)) : Math.max(...values);
  const low = isSigned ? -high : Math.min(...values);
  const small = new OffscreenCanvas(width, height), picture = new ImageData(width, height);
  values.forEach((value, i) => {
    const share = high > low ? (value - low) / (high - low) : isSigned ? 0.5 : 0;
    picture.data.set([...colorOf(share, isSigned ? RED_BLUE : INFERNO), 255], 4 * i);
  });
  small.getContext("2d").putImageData(picture, 0, 0);
  const canvas = byId("picture"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [photo.width, photo.height];
  context.filter = "grayscale(1)";
  context.drawImage(photo, 0, 0);
  context.filter = "none";
  context.globalAlpha = Number(byId("opacity").value);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, photo.width, photo.height);
  context.globalAlpha = 1;
  canvas.dataset.map = name;
}

async function told(step) {
  byId("error").textContent = "";
  try {
    await step();
  } catch (error) {
    byId("error").textContent = String(error.message ?? error);
  }
}

async function fetched(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: ${response.status} ${response.statusText}`);
  return response;
}

byId("model").onchange = (event) => told(async () => openModel(await event.target.files[0].arrayBuffer()));
byId("photo").onchange = (event) => told(() => openPhoto(event.target.files[0]));
byId("class").onchange = (event) => told(() => run(Number(event.target.value)));
byId("map").onchange = () => answer && draw();
byId("opacity").oninput = () => answer && draw();

ort.env.wasm.wasmPaths = new URL("ort/", document.baseURI).href;
ort.env.wasm.numThreads = 1; // more need a server that isolates the page

// index.html?model=photos.onnx&photo=cat.jpg opens files that lie beside the page.
const asked = new URLSearchParams(location.search);
told(async () => {
  if (asked.has("model")) await openModel(await (await fetched(asked.get("model"))).arrayBuffer());
  if (asked.has("photo")) await openPhoto(await (await fetched(asked.get("photo"))).blob());
});
