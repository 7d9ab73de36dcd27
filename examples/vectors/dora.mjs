// DoRA in plain loops, in double. check.mjs checks it. Put your implementation in its place.
//
// `compute` maps the kind of a case to a function of its entry in the manifest and its inputs, which
// are { shape, data } by name. It returns lists of numbers by name, row-major.

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

// The numbers of a tensor as a matrix.
const matrix = ({ shape, data }) => ({ rows: shape[0], cols: shape[1], data });

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

// Updates that are other products than B A. Without a magnitude W' is V.

function adapted({ scaling: s, form }, input, update) {
  const w = matrix(input.weight);
  const lengths = norms(w);
  const base = form === "direction" ? rowsTimes(perRow(w, (i) => orZero(1 / lengths[i])), w) : w;
  const v = plus(base, scaled(s, update));
  if (input.magnitude === undefined) return { v: v.data, merged: v.data };
  const norm = norms(v);
  const gain = perRow(v, (i) => (norm[i] > 0 ? input.magnitude.data[i] / norm[i] : 0));
  return { v: v.data, norm, gain, merged: rowsTimes(gain, v).data };
}

function loha(entry, input) {
  const first = times(matrix(input.first_b), matrix(input.first_a));
  const second = times(matrix(input.second_b), matrix(input.second_a));
  const product = (i, j) => at(first, i, j) * at(second, i, j);
  return adapted(entry, input, filled(first.rows, first.cols, product));
}

function lokr(entry, input) {
  const left = matrix(input.left);
  const { right: whole, right_a: a, right_b: b } = input;
  const right = whole ? matrix(whole) : times(matrix(b), matrix(a));
  const update = filled(left.rows * right.rows, left.cols * right.cols, (i, j) => {
    const [p, q] = [Math.floor(i / right.rows), Math.floor(j / right.cols)];
    return at(left, p, q) * at(right, i % right.rows, j % right.cols);
  });
  return adapted(entry, input, update);
}

// W + Σ tᵢ (W'ᵢ − W), of several adapters of one weight.

function sumOfAdapters({ strengths, scalings }, input) {
  const w = matrix(input.weight);
  const total = strengths.reduce((found, t, k) => {
    const part = (name) => input[`${name} ${k + 1}`];
    const update = times(matrix(part("lora_b")), matrix(part("lora_a")));
    const one = { weight: input.weight, magnitude: part("magnitude") };
    const { merged } = adapted({ scaling: scalings[k], form: "weight" }, one, update);
    return plus(found, scaled(t, minus({ ...w, data: merged }, w)));
  }, w);
  return { merged: total.data };
}

// The optimizers. `magnitude` does not decay. A step changes one array of numbers, p.

function adamw(p, gradient, state, t, decay, rate, { beta1, beta2, eps }) {
  const { mu, nu } = state;
  for (let i = 0; i < p.length; i++) {
    mu[i] = beta1 * mu[i] + (1 - beta1) * gradient[i];
    nu[i] = beta2 * nu[i] + (1 - beta2) * gradient[i] * gradient[i];
    const mean = mu[i] / (1 - beta1 ** t);
    const square = nu[i] / (1 - beta2 ** t);
    p[i] -= rate * (mean / (Math.sqrt(square) + eps) + decay * p[i]);
  }
}

function sgd(p, gradient, { mu: velocity }, t, decay, rate, { momentum }) {
  for (let i = 0; i < p.length; i++) {
    velocity[i] = momentum * velocity[i] + gradient[i] + decay * p[i];
    p[i] -= rate * velocity[i];
  }
}

// Returns M⁻¹ X for a matrix M that is symmetric and positive definite, by elimination.
function solved(m, x) {
  const rows = Array.from({ length: m.rows }, (_, i) => [
    ...m.data.slice(i * m.cols, (i + 1) * m.cols),
    ...x.data.slice(i * x.cols, (i + 1) * x.cols),
  ]);
  rows.forEach((row, k) => {
    const pivot = row[k];
    row.forEach((value, j) => (row[j] = value / pivot));
    rows.forEach((other, i) => {
      const factor = other[k];
      if (i !== k) row.forEach((value, j) => (other[j] -= factor * value));
    });
  });
  return filled(x.rows, x.cols, (i, j) => rows[i][m.cols + j]);
}

// dA ← (Bᵀ B + δ I)⁻¹ dA and dB ← dB (A Aᵀ + δ I)⁻¹.
function preconditioned(a, b, da, db, damping) {
  const damped = (m) => filled(m.rows, m.cols, (i, j) => at(m, i, j) + (i === j ? damping : 0));
  const ofB = damped(times(transposed(b), b));
  const ofA = damped(times(a, transposed(a)));
  return [solved(ofB, da), transposed(solved(ofA, transposed(db)))];
}

function optimized(step, { kind, numbers }, inputs) {
  const names = ["lora_a", "lora_b", "magnitude"];
  const zeros = (name) => new Float64Array(inputs[name].data.length);
  const params = names.map((name) => Float64Array.from(inputs[name].data));
  const states = names.map((name) => ({ mu: zeros(name), nu: zeros(name) }));
  const found = {};
  for (const t of [1, 2, 3]) {
    let gradients = names.map((name) => inputs[`grad ${name} ${t}`].data);
    if (kind === "scaled_adamw") {
      const like = (name, data) => ({ ...matrix(inputs[name]), data });
      const [a, b, da, db] = [...params.slice(0, 2), ...gradients.slice(0, 2)].map((data, i) =>
        like(names[i % 2], data),
      );
      const both = preconditioned(a, b, da, db, numbers.damping);
      gradients = [...both.map(({ data }) => data), gradients[2]];
    }
    names.forEach((name, i) => {
      const decay = name === "magnitude" ? 0 : numbers.weight_decay;
      const faster = kind === "loraplus" && name === "lora_b" ? numbers.ratio : 1;
      step(params[i], gradients[i], states[i], t, decay, faster * numbers.learning_rate, numbers);
      found[`${name} ${t}`] = Float64Array.from(params[i]);
    });
  }
  return found;
}

export const compute = {
  layer: stacked,
  convolution,
  embedding,
  loha,
  lokr,
  sum: sumOfAdapters,
  sgd: (entry, inputs) => optimized(sgd, entry, inputs),
  adamw: (entry, inputs) => optimized(adamw, entry, inputs),
  loraplus: (entry, inputs) => optimized(adamw, entry, inputs),
  scaled_adamw: (entry, inputs) => optimized(adamw, entry, inputs),
};
