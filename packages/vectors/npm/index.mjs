// Golden vectors of DoRA: inputs, right results, and how far rounding may lead from them.
//
//     import { readCases, wrong } from "doraxp-vectors";
//     for (const found of readCases("float32", { kinds: ["layer"] })) {
//       const problems = wrong(found, { merged: myMerge(found.entry, found.inputs) });
//     }
//
// A number is right where |actual − expected| ≤ bound. The files are in the folder `data`.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const FORMAT = 2;
export const data = fileURLToPath(new URL("./data", import.meta.url));

/** Returns the manifest. Throws where it is damaged or has another format. */
export function readManifest(folder = data) {
  const manifest = JSON.parse(read(folder, "manifest.json").toString("utf8"));
  if (manifest.format !== FORMAT) {
    throw new Error(`manifest.json: format must be ${FORMAT}, got ${manifest.format}`);
  }
  return manifest;
}

/**
 * Returns the cases with inputs in a dtype, float32 or float64: those of some kinds, or all.
 *
 * Each has `entry`, its entry in the manifest, and `inputs`, `expected` and `bound`: objects from
 * names to { shape, data }, where data is a typed array, row-major.
 */
export function readCases(dtype = "float64", { folder = data, kinds } = {}) {
  const manifest = readManifest(folder);
  const known = [...new Set(manifest.cases.map((entry) => entry.kind))].sort();
  check("dtype", dtype, Object.keys(manifest.files));
  for (const kind of kinds ?? []) check("kind", kind, known);
  const arrays = tensors(read(folder, manifest.files[dtype]));
  const group = (entry, group, names) =>
    Object.fromEntries(
      names.map((name) => {
        const array = arrays.get(`${entry.name}/${group}/${name}`);
        if (array === undefined) throw new Error(`${entry.name}: there is no ${group}/${name}`);
        return [name, array];
      }),
    );
  return manifest.cases
    .filter((entry) => (kinds ?? known).includes(entry.kind))
    .map((entry) => ({
      entry,
      inputs: group(entry, "inputs", entry.inputs),
      expected: group(entry, "expected", entry.expected),
      bound: group(entry, "bound", entry.expected),
    }));
}

/**
 * Returns a line for each array that has a number outside its bound. `found` is an object from
 * names to lists of numbers, row-major; an array without numbers is undefined.
 */
export function wrong({ entry, expected, bound }, found) {
  return Object.entries(found).flatMap(([name, numbers]) => {
    check("array", name, Object.keys(expected));
    const { data: wanted } = expected[name];
    const limits = bound[name].data;
    const rule = `${entry.name}, ${name}:`;
    if (numbers?.length !== wanted.length) {
      return [`${rule} must have ${wanted.length} numbers, has ${numbers?.length}`];
    }
    const bad = [...wanted.keys()].filter((i) => !(Math.abs(numbers[i] - wanted[i]) <= limits[i]));
    if (bad.length === 0) return []; // NaN is bad
    const [i] = bad;
    const must = `must be ${wanted[i]} ± ${limits[i]}, got ${numbers[i]}`;
    return [`${rule} number ${i} ${must}; ${bad.length} of ${wanted.length} are wrong`];
  });
}

function check(name, value, choices) {
  if (!choices.includes(value)) {
    throw new Error(`${name} must be one of ${choices.join(", ")}, got ${value}`);
  }
}

// Returns the bytes of a file, and compares them with their checksum.
function read(folder, name) {
  const lines = readFileSync(join(folder, "SHA256SUMS"), "utf8").split("\n");
  const line = lines.find((one) => one.slice(66) === name);
  const bytes = readFileSync(join(folder, name));
  const found = createHash("sha256").update(bytes).digest("hex");
  if (line?.slice(0, 64) !== found) {
    const wanted = line?.slice(0, 64);
    throw new Error(
      `${name}: its SHA-256 must be ${wanted}, as SHA256SUMS says, got ${found}; ` +
        "install the vectors again",
    );
  }
  return bytes;
}

// safetensors: 8 bytes with the length of a JSON header, the header, the numbers. Little-endian.
function tensors(bytes) {
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, start));
  const kinds = {
    F64: [Float64Array, "readDoubleLE"],
    F32: [Float32Array, "readFloatLE"],
    I32: [Int32Array, "readInt32LE"],
  };
  delete header.__metadata__;
  return new Map(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [first, last] }]) => {
      const [kind, method] = kinds[dtype];
      const size = kind.BYTES_PER_ELEMENT;
      const numbers = new kind((last - first) / size);
      for (let i = 0; i < numbers.length; i++) {
        numbers[i] = bytes[method](start + first + size * i);
      }
      return [name, { shape, data: numbers }];
    }),
  );
}
