// DoRA in plain loops, in double. check.rs checks it. Put your implementation in its place.
//
// `compute` gets the entry of a case in the manifest and its inputs, and returns numbers by name.

use crate::doraxp_vectors::{Array, Json};
use std::collections::HashMap;

pub type Results = HashMap<String, Vec<f64>>;
type Compute = fn(&Case) -> Result<Results, String>;

pub const KINDS: [(&str, Compute); 10] = [
    ("layer", linear),
    ("convolution", convolution),
    ("embedding", embedding),
    ("loha", loha),
    ("lokr", lokr),
    ("sum", sum_of_adapters),
    ("adamw", optimizer),
    ("sgd", optimizer),
    ("loraplus", optimizer),
    ("scaled_adamw", optimizer),
];

pub struct Case<'a> {
    pub entry: &'a Json,
    pub inputs: HashMap<&'a str, &'a Array>,
}

impl<'a> Case<'a> {
    fn optional(&self, name: &str) -> Option<&'a Array> {
        self.inputs.get(name).copied()
    }

    fn input(&self, name: &str) -> Result<&'a Array, String> {
        self.optional(name).ok_or(format!("{}: there is no inputs/{name}", self.entry.text("name")))
    }

    fn matrix(&self, name: &str) -> Result<Matrix, String> {
        let Array { shape, data } = self.input(name)?;
        Ok(Matrix { rows: shape[0], cols: shape[1], data: data.clone() })
    }

    fn is(&self, key: &str, value: &str) -> bool {
        self.entry.text(key) == value
    }
}

// Computes a case.
pub fn compute(case: &Case) -> Result<Results, String> {
    let kind = case.entry.text("kind");
    match KINDS.iter().find(|(name, _)| *name == kind) {
        Some((_, compute)) => compute(case),
        None => {
            let known = KINDS.map(|(name, _)| name).join(", ");
            Err(format!("{}: kind must be one of {known}, got {kind}", case.entry.text("name")))
        }
    }
}

// Matrices are row-major.

#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Matrix {
    fn new(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Matrix {
        let data = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
        Matrix { rows, cols, data }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.cols + j]
    }

    fn transposed(&self) -> Matrix {
        Matrix::new(self.cols, self.rows, |i, j| self.at(j, i))
    }

    fn times(&self, other: &Matrix) -> Matrix {
        let dot = |i, j| (0..self.cols).map(|k| self.at(i, k) * other.at(k, j)).sum();
        Matrix::new(self.rows, other.cols, dot)
    }

    fn with(&self, other: &Matrix, of: impl Fn(f64, f64) -> f64) -> Matrix {
        Matrix::new(self.rows, self.cols, |i, j| of(self.at(i, j), other.at(i, j)))
    }

    fn plus(&self, other: &Matrix) -> Matrix {
        self.with(other, |a, b| a + b)
    }

    fn minus(&self, other: &Matrix) -> Matrix {
        self.with(other, |a, b| a - b)
    }

    fn product(&self, other: &Matrix) -> Matrix {
        self.with(other, |a, b| a * b)
    }

    fn scaled(&self, s: f64) -> Matrix {
        Matrix::new(self.rows, self.cols, |i, j| s * self.at(i, j))
    }

    fn rows_by(&self, column: &[f64]) -> Matrix {
        Matrix::new(self.rows, self.cols, |i, j| column[i] * self.at(i, j))
    }

    fn cols_by(&self, row: &[f64]) -> Matrix {
        Matrix::new(self.rows, self.cols, |i, j| row[j] * self.at(i, j))
    }

    fn row_sums(&self) -> Vec<f64> {
        (0..self.rows).map(|i| (0..self.cols).map(|j| self.at(i, j)).sum()).collect()
    }

    fn norms(&self) -> Vec<f64> {
        self.product(self).row_sums().into_iter().map(f64::sqrt).collect()
    }
}

fn or_zero(numerator: f64, denominator: f64) -> f64 {
    if denominator > 0.0 {
        numerator / denominator
    } else {
        0.0
    } // a row of zeros
}

fn ratios(numerators: &[f64], denominators: &[f64]) -> Vec<f64> {
    numerators.iter().zip(denominators).map(|(&a, &b)| or_zero(a, b)).collect()
}

fn named<const N: usize>(results: [(&str, Vec<f64>); N]) -> Results {
    results.into_iter().map(|(name, data)| (name.to_string(), data)).collect()
}

// DoRA: V = ρ⊙W + s B A, n = ‖V‖ by rows, g = m / n, W' = g⊙V.

struct Layer {
    x: Matrix,
    w: Matrix,
    a: Matrix,
    b: Matrix,
    dy: Matrix,
    m: Vec<f64>,
    bias: Option<Vec<f64>>,
    mask: Option<Matrix>,
}

fn layer(case: &Case, Layer { x, w, a, b, dy, m, bias, mask }: Layer) -> Results {
    let s = case.entry.number("scaling");
    let direction = case.is("form", "direction");
    let exact = case.is("norm_gradient", "exact");
    let of_input = case.is("dropout", "input");
    let low_rank_only = case.is("dropout", "low_rank");

    let lengths = w.norms();
    let rho: Vec<f64> =
        lengths.iter().map(|&n| if direction { or_zero(1.0, n) } else { 1.0 }).collect();
    let base = w.rows_by(&rho);
    let v = base.plus(&b.times(&a).scaled(s));
    let n = v.norms();
    let g = ratios(&m, &n);
    let merged = v.rows_by(&g);

    // W' multiplies the masked x, and `beside` multiplies the rest of x.
    let seen = mask.as_ref().map_or(x.clone(), |mask| mask.product(&x));
    let rest = x.minus(&seen);
    let beside = if low_rank_only { base.rows_by(&g) } else { w.clone() };

    let mut z = seen.times(&v.transposed());
    if low_rank_only {
        z = z.plus(&rest.times(&base.transposed()));
    }
    let mut y = z.cols_by(&g);
    if of_input {
        y = y.plus(&rest.times(&w.transposed()));
    }
    if let Some(bias) = bias {
        y = Matrix::new(y.rows, y.cols, |t, i| y.at(t, i) + bias[i]);
    }

    let dz = dy.cols_by(&g);
    let e = dy.product(&z).transposed().row_sums();
    let dm = ratios(&e, &n);
    let slope = |i: usize| or_zero(-m[i] * e[i], n[i].powi(3));
    let q: Vec<f64> = (0..w.rows).map(|i| if exact { slope(i) } else { 0.0 }).collect();
    let dv = dz.transposed().times(&seen).plus(&v.rows_by(&q));
    let mut dx = dy.times(&merged);
    let mut dw = dv.clone();
    if low_rank_only {
        dw = dw.plus(&dz.transposed().times(&rest));
    }
    if direction {
        let along = base.product(&dw).row_sums();
        dw = dw.minus(&base.rows_by(&along)).rows_by(&rho);
    }
    if of_input {
        dw = dw.plus(&dy.transposed().times(&rest));
    }
    if let Some(mask) = mask {
        let other = dy.times(&beside);
        dx = mask.product(&dx).plus(&other.minus(&mask.product(&other)));
    }
    named([
        ("initial", lengths),
        ("norm", n),
        ("merged", merged.data),
        ("y", y.data),
        ("dx", dx.data),
        ("da", b.transposed().times(&dv).scaled(s).data),
        ("db", dv.times(&a.transposed()).scaled(s).data),
        ("dm", dm),
        ("dw", dw.data),
        ("dbias", dy.transposed().row_sums()),
        ("u", w.times(&a.transposed()).rows_by(&rho).data),
        ("row_scale", rho),
        ("v", v.data),
        ("gain", g),
        ("gram", a.times(&a.transposed()).data),
        ("low_rank", seen.times(&a.transposed()).data),
        ("z", z.data),
        ("dz", dz.data),
        ("e", e),
        ("q", q),
    ])
}

// The inputs of a stack of layers: x and mask (parts, tokens, in), dy (parts, tokens, out).
struct Stack {
    parts: usize,
    out: usize,
    inner: usize,
    x: Vec<f64>,
    weight: Vec<f64>,
    dy: Vec<f64>,
    mask: Option<Vec<f64>>,
}

// A stack holds one layer after the other.
fn stack(case: &Case, given: &Stack) -> Result<Results, String> {
    let &Stack { parts, out, inner, .. } = given;
    let (a, b) = (case.input("lora_a")?, case.input("lora_b")?);
    let (m, bias) = (case.input("magnitude")?, case.optional("bias"));
    let rank = b.data.len() / (parts * out);
    let tokens = given.dy.len() / (parts * out);
    let mut found = Results::new();
    for k in 0..parts {
        let part = |data: &[f64], rows: usize, cols: usize| Matrix {
            rows,
            cols,
            data: data[k * rows * cols..(k + 1) * rows * cols].to_vec(),
        };
        let one = Layer {
            x: part(&given.x, tokens, inner),
            w: part(&given.weight, out, inner),
            a: part(&a.data, rank, inner),
            b: part(&b.data, out, rank),
            dy: part(&given.dy, tokens, out),
            m: part(&m.data, 1, out).data,
            bias: bias.map(|bias| part(&bias.data, 1, out).data),
            mask: given.mask.as_ref().map(|mask| part(mask, tokens, inner)),
        };
        for (name, data) in layer(case, one) {
            found.entry(name).or_default().extend(data);
        }
    }
    Ok(found)
}

fn linear(case: &Case) -> Result<Results, String> {
    let weight = case.input("weight")?;
    let [.., out, inner] = weight.shape[..] else { return Err("weight: it has no rows".into()) };
    let given = Stack {
        parts: weight.data.len() / (out * inner),
        out,
        inner,
        x: case.input("x")?.data.clone(),
        weight: weight.data.clone(),
        dy: case.input("dy")?.data.clone(),
        mask: case.optional("dropout_mask").map(|mask| mask.data.clone()),
    };
    stack(case, &given)
}

// A convolution is a linear layer of windows. `read` lists which numbers of x and of the windows are
// equal. Both have a part for each group; y has its outputs before its positions, the layer after.

fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    shape.iter().fold(vec![vec![]], |all, &size| {
        let longer = |index: &Vec<usize>, k| [index.as_slice(), &[k]].concat();
        all.iter().flat_map(|index| (0..size).map(move |k| longer(index, k))).collect()
    })
}

fn flat(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |total, (i, size)| total * size + i)
}

fn convolution(case: &Case) -> Result<Results, String> {
    let [x, weight, dy] = [case.input("x")?, case.input("weight")?, case.input("dy")?];
    let [stride, padding, dilation] =
        ["stride", "padding", "dilation"].map(|key| case.entry.numbers(key));
    let groups = case.entry.number("groups") as usize;
    let (batch, size) = (x.shape[0], &x.shape[2..]);
    let (out, inner, kernel) = (weight.shape[0] / groups, weight.shape[1], &weight.shape[2..]);
    let positions = &dy.shape[2..];
    let windows = [&[groups, batch], positions, &[inner], kernel].concat();

    let mut read = Vec::new();
    for (to, index) in indices(&windows).iter().enumerate() {
        let (p, rest) = index[2..].split_at(size.len());
        let place =
            |d: usize| p[d] as f64 * stride[d] - padding[d] + rest[1 + d] as f64 * dilation[d];
        let places: Vec<f64> = (0..size.len()).map(place).collect();
        if places.iter().zip(size).all(|(&n, &size)| n >= 0.0 && n < size as f64) {
            let mut from = vec![index[1], index[0] * inner + rest[0]];
            from.extend(places.iter().map(|&n| n as usize));
            read.push((flat(&from, &x.shape), to));
        }
    }
    let turned = indices(&[&[groups, batch], positions, &[out]].concat());
    let places: Vec<usize> = turned
        .iter()
        .map(|index| {
            let (o, p) = (index[index.len() - 1], &index[2..index.len() - 1]);
            flat(&[&[index[1], index[0] * out + o], p].concat(), &dy.shape)
        })
        .collect();
    let unfolded = |data: &[f64]| {
        let mut found = vec![0.0; windows.iter().product()];
        read.iter().for_each(|&(from, to)| found[to] = data[from]);
        found
    };
    let given = Stack {
        parts: groups,
        out,
        inner: inner * kernel.iter().product::<usize>(),
        x: unfolded(&x.data),
        weight: weight.data.clone(),
        dy: places.iter().map(|&from| dy.data[from]).collect(),
        mask: case.optional("dropout_mask").map(|mask| unfolded(&mask.data)),
    };
    let mut found = stack(case, &given)?;
    let mut y = vec![0.0; dy.data.len()];
    places.iter().zip(&found["y"]).for_each(|(&to, &value)| y[to] = value);
    let mut dx = vec![0.0; x.data.len()];
    read.iter().for_each(|&(to, from)| dx[to] += found["dx"][from]);
    found.extend(named([("y", y), ("dx", dx)]));
    Ok(found)
}

// An embedding is a linear layer of rows that have `scale` at the id, and 0 elsewhere.

fn embedding(case: &Case) -> Result<Results, String> {
    let (table, ids) = (case.matrix("weight")?, &case.input("x")?.data);
    let scale = case.entry.number("scale");
    let one = |t: usize, token: usize| if ids[t] == token as f64 { scale } else { 0.0 };
    let given = Stack {
        parts: 1,
        out: table.cols,
        inner: table.rows,
        x: Matrix::new(ids.len(), table.rows, one).data,
        weight: table.transposed().data,
        dy: case.input("dy")?.data.clone(),
        mask: None,
    };
    let mut found = stack(case, &given)?;
    for name in ["merged", "dw"] {
        let wide = Matrix { rows: table.cols, cols: table.rows, data: found[name].clone() };
        found.insert(name.to_string(), wide.transposed().data);
    }
    Ok(found)
}

// Updates that are other products than B A. Without a magnitude W' is V.

fn adapted(base: &Matrix, s: f64, update: &Matrix, m: Option<&Array>) -> Results {
    let v = base.plus(&update.scaled(s));
    let Some(m) = m else { return named([("merged", v.data.clone()), ("v", v.data)]) };
    let norm = v.norms();
    let gain = ratios(&m.data, &norm);
    named([("merged", v.rows_by(&gain).data), ("v", v.data), ("norm", norm), ("gain", gain)])
}

fn adapted_by(case: &Case, update: &Matrix) -> Result<Results, String> {
    let mut base = case.matrix("weight")?;
    if case.is("form", "direction") {
        base = base.rows_by(&ratios(&vec![1.0; base.rows], &base.norms()));
    }
    Ok(adapted(&base, case.entry.number("scaling"), update, case.optional("magnitude")))
}

fn loha(case: &Case) -> Result<Results, String> {
    let first = case.matrix("first_b")?.times(&case.matrix("first_a")?);
    let second = case.matrix("second_b")?.times(&case.matrix("second_a")?);
    adapted_by(case, &first.product(&second))
}

fn lokr(case: &Case) -> Result<Results, String> {
    let left = case.matrix("left")?;
    let right = match case.optional("right") {
        Some(_) => case.matrix("right")?,
        None => case.matrix("right_b")?.times(&case.matrix("right_a")?),
    };
    let update = Matrix::new(left.rows * right.rows, left.cols * right.cols, |i, j| {
        left.at(i / right.rows, j / right.cols) * right.at(i % right.rows, j % right.cols)
    });
    adapted_by(case, &update)
}

// W + Σ tᵢ (W'ᵢ − W), of several adapters of one weight.

fn sum_of_adapters(case: &Case) -> Result<Results, String> {
    let weight = case.matrix("weight")?;
    let mut total = weight.clone();
    let (strengths, scalings) = (case.entry.numbers("strengths"), case.entry.numbers("scalings"));
    for (k, (&t, &s)) in (1..).zip(strengths.iter().zip(&scalings)) {
        let (a, b) = (case.matrix(&format!("lora_a {k}"))?, case.matrix(&format!("lora_b {k}"))?);
        let one = adapted(&weight, s, &b.times(&a), case.optional(&format!("magnitude {k}")));
        let merged = Matrix { data: one["merged"].clone(), ..weight.clone() };
        total = total.plus(&merged.minus(&weight).scaled(t));
    }
    Ok(named([("merged", total.data)]))
}

// The optimizers. `magnitude` does not decay. A step changes one array of numbers, p.

struct Parameter {
    p: Vec<f64>,
    mu: Vec<f64>,
    nu: Vec<f64>,
}

fn adamw(of: &mut Parameter, g: &[f64], t: i32, rate: f64, decay: f64, numbers: &Json) {
    let [beta1, beta2, eps] = ["beta1", "beta2", "eps"].map(|key| numbers.number(key));
    for i in 0..g.len() {
        of.mu[i] = beta1 * of.mu[i] + (1.0 - beta1) * g[i];
        of.nu[i] = beta2 * of.nu[i] + (1.0 - beta2) * g[i] * g[i];
        let (mean, square) = (of.mu[i] / (1.0 - beta1.powi(t)), of.nu[i] / (1.0 - beta2.powi(t)));
        of.p[i] -= rate * (mean / (square.sqrt() + eps) + decay * of.p[i]);
    }
}

fn sgd(of: &mut Parameter, g: &[f64], rate: f64, decay: f64, momentum: f64) {
    for i in 0..g.len() {
        of.mu[i] = momentum * of.mu[i] + g[i] + decay * of.p[i];
        of.p[i] -= rate * of.mu[i];
    }
}

// Returns M⁻¹ X for a matrix M that is symmetric and positive definite, by elimination.
fn solved(m: &Matrix, x: &Matrix) -> Matrix {
    let (mut m, mut x) = (m.clone(), x.clone());
    for k in 0..m.rows {
        let factor: Vec<f64> =
            (0..m.rows).map(|i| if i == k { 0.0 } else { m.at(i, k) / m.at(k, k) }).collect();
        m = Matrix::new(m.rows, m.cols, |i, j| m.at(i, j) - factor[i] * m.at(k, j));
        x = Matrix::new(x.rows, x.cols, |i, j| x.at(i, j) - factor[i] * x.at(k, j));
    }
    Matrix::new(x.rows, x.cols, |i, j| x.at(i, j) / m.at(i, i))
}

// Returns (Bᵀ B + δ I)⁻¹ dA and dB (A Aᵀ + δ I)⁻¹.
fn preconditioned(a: &Matrix, b: &Matrix, da: &Matrix, db: &Matrix, damping: f64) -> [Matrix; 2] {
    let damped = |m: Matrix| {
        Matrix::new(m.rows, m.cols, |i, j| m.at(i, j) + if i == j { damping } else { 0.0 })
    };
    let (of_a, of_b) = (damped(a.times(&a.transposed())), damped(b.transposed().times(b)));
    [solved(&of_b, da), solved(&of_a, &db.transposed()).transposed()]
}

fn optimizer(case: &Case) -> Result<Results, String> {
    let names = ["lora_a", "lora_b", "magnitude"];
    let numbers = case.entry.get("numbers").unwrap_or(&Json::Null);
    let mut params = Vec::new();
    for name in names {
        let p = case.input(name)?.data.clone();
        let zeros = vec![0.0; p.len()];
        params.push(Parameter { p, mu: zeros.clone(), nu: zeros });
    }
    let mut found = Results::new();
    for t in 1..=3 {
        let mut gradients = Vec::new();
        for name in names {
            gradients.push(case.input(&format!("grad {name} {t}"))?.data.clone());
        }
        if case.is("kind", "scaled_adamw") {
            let like = |i: usize, data: &Vec<f64>| {
                case.matrix(names[i]).map(|matrix| Matrix { data: data.clone(), ..matrix })
            };
            let (a, b) = (like(0, &params[0].p)?, like(1, &params[1].p)?);
            let (da, db) = (like(0, &gradients[0])?, like(1, &gradients[1])?);
            let [da, db] = preconditioned(&a, &b, &da, &db, numbers.number("damping"));
            gradients[..2].clone_from_slice(&[da.data, db.data]);
        }
        for (i, name) in names.into_iter().enumerate() {
            let mut rate = numbers.number("learning_rate");
            let decay = if name == "magnitude" { 0.0 } else { numbers.number("weight_decay") };
            if name == "lora_b" && case.is("kind", "loraplus") {
                rate *= numbers.number("ratio");
            }
            if case.is("kind", "sgd") {
                sgd(&mut params[i], &gradients[i], rate, decay, numbers.number("momentum"));
            } else {
                adamw(&mut params[i], &gradients[i], t, rate, decay, numbers);
            }
            found.insert(format!("{name} {t}"), params[i].p.clone());
        }
    }
    Ok(found)
}
