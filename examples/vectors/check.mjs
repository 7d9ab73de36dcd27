// Checks an implementation of DoRA against the golden vectors of `doraxp vectors --out DIR`:
//
//     node examples/vectors/check.mjs DIR
//
// The implementation is in dora.mjs.
// The exit status is 0 if every number is within its bound, 1 if not, 2 if DIR cannot be read or has
// a case of a kind that dora.mjs does not know.

import { readCases, readManifest, wrong } from "../../packages/vectors/npm/index.mjs";
import { compute } from "./dora.mjs";

function main(folder) {
  const manifest = readManifest(folder);
  let [checked, failures] = [0, 0];
  for (const dtype of Object.keys(manifest.files)) {
    for (const found of readCases(dtype, { folder })) {
      const { kind, name } = found.entry;
      if (!Object.hasOwn(compute, kind)) {
        const known = Object.keys(compute).join(", ");
        throw new Error(`${name}: kind must be one of ${known}, got ${kind}`);
      }
      const actual = compute[kind](found.entry, found.inputs);
      const expected = Object.entries(found.expected);
      const compared = Object.fromEntries(expected.map(([name]) => [name, actual[name]]));
      const problems = wrong(found, compared);
      for (const problem of problems) console.log(`WRONG ${dtype}, ${problem}`);
      checked += expected.reduce((count, [, { data }]) => count + data.length, 0);
      failures += problems.length;
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
