// Checks an implementation of DoRA against the golden vectors of `doraxp vectors --out DIR`:
//
//     node examples/vectors/check.mjs DIR
//
// The implementation is the one below: plain loops in double, no dependencies. Put yours in its place.
// The exit status is 0 if every number is within its bound, 1 if not, 2 if DIR cannot be read.

import { readFileSync } from "node:fs";
import { join } from "node:path";

// safetensors: 8 bytes with the length of a JSON header, the header, the data. Little-endian.

function readTensors(path) {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  const tensors = new Map();
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [start, stop] = entry.data_offsets.map((offset) => 8 + length + offset);
    const size = { F64: 8, F32: 4, I32: 4 }[entry.dtype];
    const data = new Float64Array((stop - start) / size);
    for (let i = 0; i < data.length; i++) {
      const at = start + size * i;
      if (entry.dtype === "I32") data[i] = bytes.readInt32LE(at);
      else data[i] = size === 8 ? bytes.readDoubleLE(at) : bytes.readFloatLE(at);
    }
    tensors.set(name, { shape: entry.shape, data });
  }
  return tensors;
}

// Matrices are { rows, cols, data }, row-major.

const filled = (rows, cols, value) => {
  const data = new Float64Array(rows * cols);
  for (let i = 0; i < rows; i++) for (let j = 0; j < cols; j++) data[i * cols + j] = value(i, j);
  return { rows, cols, data };
};
const at = (m, i, j) => m.data[i * m.cols + j];
const sum = (count, term) => {
  let total = 0;
  for (let k = 0; k < count; k++) total += term(k);
  return total;
};
const transposed = (m) => filled(m.cols, m.rows, (i, j) => at(m, j, i));
const times = (a, b) =>
  filled(a.rows, b.cols, (i, j) => sum(a.cols, (k) => at(a, i, k) * at(b, k, j)));
const plus = (a, b) => filled(a.rows, a.cols, (i, j) => at(a, i, j) + at(b, i, j));
const minus = (a, b) => filled(a.rows, a.cols, (i, j) => at(a, i, j) - at(b, i, j));
const scaled = (s, m) => filled(m.rows, m.cols, (i, j) => s * at(m, i, j));
const rowsTimes = (column, m) => filled(m.rows, m.cols, (i, j) => column[i] * at(m, i, j));
const colsTimes = (row, m) => filled(m.rows, m.cols, (i, j) => row[j] * at(m, i, j));
const perRow = (m, of) => Float64Array.from({ length: m.rows }, (_, i) => of(i));
const norms = (m) => perRow(m, (i) => Math.sqrt(sum(m.cols, (j) => at(m, i, j) ** 2)));
const orZero = (quotient) => (Number.isFinite(quotient) ? quotient : 0); // a row of zeros

// DoRA: V = ρ⊙W + s B A, n = ‖V‖ by rows, g = m / n, W' = g⊙V.

function layer({ scaling: s, form, norm_gradient, dropout }, input) {
  const { x, weight: w, lora_a: a, lora_b: b, dy } = input;
  const m = input.magnitude.data;
  const lengths = norms(w);
  const rho = perRow(w, (i) => (form === "direction" ? orZero(1 / lengths[i]) : 1));
  const base = rowsTimes(rho, w);
  const update = scaled(s, times(b, a));
  const v = plus(base, update);
  const n = norms(v);
  const g = perRow(v, (i) => (n[i] > 0 ? m[i] / n[i] : 0));
  const merged = rowsTimes(g, v);

  // W' multiplies the masked x, and `beside` multiplies the rest of x.
  const mask = dropout === null ? null : input.dropout_mask;
  const seen = mask === null ? x : filled(x.rows, x.cols, (t, j) => at(mask, t, j) * at(x, t, j));
  const rest = minus(x, seen);
  const lowRankOnly = dropout === "low_rank";
  const beside = lowRankOnly ? rowsTimes(g, base) : w;

  const lowRank = times(seen, transposed(a));
  let z = times(seen, transposed(v));
  if (lowRankOnly) z = plus(z, times(rest, transposed(base)));
  let y = colsTimes(g, z);
  if (dropout === "input") y = plus(y, times(rest, transposed(w)));
  if (input.bias) y = filled(y.rows, y.cols, (t, i) => at(y, t, i) + input.bias.data[i]);

  const dz = colsTimes(g, dy);
  const e = perRow(v, (i) => sum(dy.rows, (t) => at(dy, t, i) * at(z, t, i)));
  const dm = perRow(v, (i) => (n[i] > 0 ? e[i] / n[i] : 0));
  const exact = norm_gradient === "exact";
  const q = perRow(v, (i) => (exact && n[i] > 0 ? (-m[i] * e[i]) / n[i] ** 3 : 0));
  const dv = plus(times(transposed(dz), seen), rowsTimes(q, v));
  let dx = times(dy, merged);
  let dw = dv;
  if (lowRankOnly) dw = plus(dw, times(transposed(dz), rest));
  if (form === "direction") {
    const along = perRow(w, (i) => sum(w.cols, (j) => at(base, i, j) * at(dw, i, j)));
    dw = rowsTimes(rho, minus(dw, rowsTimes(along, base)));
  }
  if (dropout === "input") dw = plus(dw, times(transposed(dy), rest));
  if (mask !== null) {
    const other = times(dy, beside);
    dx = filled(x.rows, x.cols, (t, j) => {
      const keep = at(mask, t, j);
      return keep * at(dx, t, j) + (1 - keep) * at(other, t, j);
    });
  }
  return {
    initial: lengths,
    norm: n,
    merged: merged.data,
    y: y.data,
    dx: dx.data,
    da: scaled(s, times(transposed(b), dv)).data,
    db: scaled(s, times(dv, transposed(a))).data,
    dm,
    dw: dw.data,
    dbias: perRow(v, (i) => sum(dy.rows, (t) => at(dy, t, i))),
    row_scale: rho,
    v: v.data,
    gain: g,
    u: rowsTimes(rho, times(w, transposed(a))).data,
    gram: times(a, transposed(a)).data,
    low_rank: lowRank.data,
    z: z.data,
    dz: dz.data,
    e,
    q,
  };
}

// A stack holds one layer after the other; x and dy have any number of tokens.
function stacked(entry, inputs) {
  const [out, inner] = inputs.weight.shape.slice(-2);
  const width = { x: inner, weight: inner, lora_a: inner, lora_b: entry.rank, dropout_mask: inner };
  const count = inputs.weight.data.length / (out * inner);
  const found = {};
  for (let k = 0; k < count; k++) {
    const one = {};
    for (const [name, { data }] of Object.entries(inputs)) {
      const size = data.length / count;
      const cols = width[name] ?? out;
      const part = data.slice(k * size, (k + 1) * size);
      one[name] = { rows: size / cols, cols, data: part };
    }
    for (const [name, values] of Object.entries(layer(entry, one))) {
      found[name] = [...(found[name] ?? []), ...values];
    }
  }
  return found;
}

// A convolution is a linear layer of windows. `read` lists which numbers of x and of the windows are
// equal. Both have a part for each group; y has its outputs before its positions, the layer after.

const indices = (shape) =>
  shape.reduce((all, size) => all.flatMap((i) => [...Array(size).keys()].map((k) => [...i, k])), [[]]);
const flat = (index, shape) => index.reduce((total, i, axis) => total * shape[axis] + i, 0);

function convolution(entry, inputs) {
  const { stride, padding, dilation, groups } = entry;
  const [batch, channels, ...size] = inputs.x.shape;
  const [outs, inner, ...kernel] = inputs.weight.shape;
  const positions = inputs.dy.shape.slice(2);
  const windows = [groups, batch, ...positions, inner, ...kernel];
  const read = [];
  for (const [g, b, ...rest] of indices(windows)) {
    const p = rest.slice(0, size.length);
    const [i, ...k] = rest.slice(size.length);
    const place = size.map((_, d) => p[d] * stride[d] - padding[d] + k[d] * dilation[d]);
    if (place.some((n, d) => n < 0 || n >= size[d])) continue;
    const from = flat([b, g * inner + i, ...place], inputs.x.shape);
    read.push([from, flat([g, b, ...rest], windows)]);
  }
  const out = outs / groups;
  const turned = [groups, batch, ...positions, out];
  const places = indices(turned).map(([g, b, ...rest]) =>
    flat([b, g * out + rest.at(-1), ...rest.slice(0, -1)], inputs.dy.shape),
  );
  const unfolded = ({ data }) => {
    const found = new Float64Array(windows.reduce((a, b) => a * b));
    for (const [from, to] of read) found[to] = data[from];
    return { data: found };
  };
  const width = inner * kernel.reduce((a, b) => a * b);
  const linear = { ...inputs, x: unfolded(inputs.x) };
  linear.weight = { shape: [groups, out, width], data: inputs.weight.data };
  if (inputs.dropout_mask) linear.dropout_mask = unfolded(inputs.dropout_mask);
  linear.dy = { data: Float64Array.from(places, (from) => inputs.dy.data[from]) };
  const found = stacked(entry, linear);
  const [y, dx] = [new Float64Array(places.length), new Float64Array(inputs.x.data.length)];
  places.forEach((to, from) => (y[to] = found.y[from]));
  for (const [to, from] of read) dx[to] += found.dx[from];
  return { ...found, y, dx };
}

// An embedding is a linear layer of rows that have `scale` at the id, and 0 elsewhere.

function embedding(entry, inputs) {
  const [tokens, dim] = inputs.weight.shape;
  const turned = (data, rows, cols) => transposed({ rows, cols, data: Float64Array.from(data) }).data;
  const ids = inputs.x.data;
  const x = filled(ids.length, tokens, (t, token) => (ids[t] === token ? entry.scale : 0));
  const weight = { shape: [dim, tokens], data: turned(inputs.weight.data, tokens, dim) };
  const found = stacked(entry, { ...inputs, x, weight });
  for (const name of ["merged", "dw"]) found[name] = turned(found[name], dim, tokens);
  return found;
}

function adamw(p, gradients, decays, { learning_rate, beta1, beta2, eps, weight_decay }) {
  let [mu, nu] = [0, 0];
  return gradients.map((gradient, step) => {
    mu = beta1 * mu + (1 - beta1) * gradient;
    nu = beta2 * nu + (1 - beta2) * gradient * gradient;
    const mean = mu / (1 - beta1 ** (step + 1));
    const square = nu / (1 - beta2 ** (step + 1));
    const pull = decays ? weight_decay * p : 0;
    p -= learning_rate * (mean / (Math.sqrt(square) + eps) + pull);
    return p;
  });
}

function sgd(p, gradients, decays, { learning_rate, momentum, weight_decay }) {
  let velocity = 0;
  return gradients.map((gradient) => {
    velocity = momentum * velocity + gradient + (decays ? weight_decay * p : 0);
    p -= learning_rate * velocity;
    return p;
  });
}

function optimized({ kind, numbers }, inputs) {
  const found = {};
  for (const name of ["lora_a", "lora_b", "magnitude"]) {
    inputs[name].data.forEach((p, i) => {
      const gradients = [1, 2, 3].map((t) => inputs[`grad ${name} ${t}`].data[i]);
      const step = { adamw, sgd }[kind];
      step(p, gradients, name !== "magnitude", numbers).forEach((value, t) => {
        (found[`${name} ${t + 1}`] ??= [])[i] = value;
      });
    });
  }
  return found;
}

// |actual − expected| ≤ bound, number by number.

function differences(entry, tensors) {
  const tensor = (group, name) => {
    const found = tensors.get(`${entry.name}/${group}/${name}`);
    if (found === undefined) throw new Error(`${entry.name}: there is no ${group}/${name}`);
    return found;
  };
  const inputs = Object.fromEntries(entry.inputs.map((name) => [name, tensor("inputs", name)]));
  const layers = { layer: stacked, convolution, embedding };
  const actual = (layers[entry.kind] ?? optimized)(entry, inputs);
  const wrong = [];
  let checked = 0;
  for (const name of entry.expected) {
    const expected = tensor("expected", name).data;
    const bound = tensor("bound", name).data;
    const got = actual[name];
    if (got?.length !== expected.length || bound.length !== expected.length) {
      wrong.push(`${name}: has ${got?.length} numbers, must have ${expected.length}`);
      continue;
    }
    const bad = [...expected.keys()].filter((i) => !(Math.abs(got[i] - expected[i]) <= bound[i]));
    if (bad.length > 0) {
      const [i] = bad;
      wrong.push(
        `${name}: number ${i} is ${got[i]}, must be ${expected[i]} ± ${bound[i]}; ` +
          `${bad.length} of ${expected.length} are wrong`,
      );
    }
    checked += expected.length;
  }
  return { wrong, checked };
}

function main(folder) {
  const manifest = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
  if (manifest.format !== 1) throw new Error(`format must be 1, got ${manifest.format}`);
  let [checked, failures] = [0, 0];
  for (const [dtype, file] of Object.entries(manifest.files)) {
    const tensors = readTensors(join(folder, file));
    for (const entry of manifest.cases) {
      const found = differences(entry, tensors);
      for (const problem of found.wrong) console.log(`WRONG ${dtype}, ${entry.name}, ${problem}`);
      checked += found.checked;
      failures += found.wrong.length;
    }
  }
  console.log(`${manifest.cases.length} cases, ${checked} numbers: ${failures} arrays are wrong`);
  return failures === 0 ? 0 : 1;
}

try {
  if (process.argv.length !== 3) throw new Error("usage: node check.mjs DIR");
  process.exitCode = main(process.argv[2]);
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
}
