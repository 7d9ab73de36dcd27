// Checks an implementation of DoRA against the golden vectors of `doraxp vectors --out DIR`:
//
//     rustc --edition 2021 -O -o check examples/vectors/check.rs && ./check DIR
//
// The implementation is in dora.rs. The exit status is 0 if every number is within its bound, 1 if not,
// 2 if DIR cannot be read or has a case of a kind that dora.rs does not know.

mod dora;
mod doraxp_vectors;

use dora::{compute, Case};
use doraxp_vectors::{Json, Vectors};
use std::process::ExitCode;

// Compares the results of a case. Returns the count of its numbers, and that of its wrong arrays.
fn check_case(vectors: &Vectors, dtype: &str, entry: &Json) -> Result<(usize, usize), String> {
    let mut case = Case { entry, inputs: Default::default() };
    for name in entry.texts("inputs") {
        case.inputs.insert(name, vectors.find(entry, "inputs", name)?);
    }
    let found = compute(&case)?;
    let (mut checked, mut failures) = (0, 0);
    for name in entry.texts("expected") {
        let expected = &vectors.find(entry, "expected", name)?.data;
        let bound = &vectors.find(entry, "bound", name)?.data;
        let actual = found.get(name).map_or(&[][..], |data| data);
        let what = format!("WRONG {dtype}, {}, {name}:", entry.text("name"));
        checked += expected.len();
        if actual.len() != expected.len() || bound.len() != expected.len() {
            println!("{what} must have {} numbers, has {}", expected.len(), actual.len());
            failures += 1;
            continue;
        }
        let right = |i: usize| (actual[i] - expected[i]).abs() <= bound[i]; // NaN is wrong
        let bad: Vec<usize> = (0..expected.len()).filter(|&i| !right(i)).collect();
        if let Some(&i) = bad.first() {
            let rule = format!("must be {} ± {}, got {}", expected[i], bound[i], actual[i]);
            println!("{what} number {i} {rule}; {} of {} are wrong", bad.len(), expected.len());
            failures += 1;
        }
    }
    Ok((checked, failures))
}

fn check(folder: &str) -> Result<bool, String> {
    let mut vectors = Vectors::open(folder)?;
    let (mut checked, mut failures) = (0, 0);
    for dtype in vectors.dtypes() {
        vectors.load(&dtype)?;
        for entry in vectors.cases() {
            let (numbers, wrong) = check_case(&vectors, &dtype, entry)?;
            checked += numbers;
            failures += wrong;
        }
    }
    let cases = vectors.cases().len();
    println!("{cases} cases, {checked} numbers: {failures} arrays are wrong");
    Ok(failures == 0)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match &arguments[..] {
        [folder] => check(folder),
        _ => Err("usage: check DIR".to_string()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
