// Reads the golden vectors that `doraxp vectors --out DIR` writes, with the standard library alone.
//
//     let mut vectors = Vectors::open("DIR")?;
//     vectors.load("float32")?;
//     for entry in vectors.cases() {
//         let weight = vectors.find(entry, "inputs", "weight")?;
//     }
//
// `entry` is an object of JSON: entry.text("kind") is its kind. A number of an array is right where
// |actual − expected| ≤ bound. The checksums are not read here: `sha256sum --check SHA256SUMS` does
// that.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const FORMAT: f64 = 2.0;
const DEPTH: usize = 64;

pub enum Json {
    Null,
    Bool,
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

// Numbers, row-major. Those of float32 and of ids are converted.
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

pub struct Vectors {
    pub manifest: Json,
    folder: PathBuf,
    arrays: HashMap<String, Array>,
}

impl Json {
    pub fn get(&self, key: &str) -> Option<&Json> {
        let Json::Object(members) = self else { return None };
        members.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    // The text of a member, and "" where there is none.
    pub fn text(&self, key: &str) -> &str {
        match self.get(key) {
            Some(Json::Text(text)) => text,
            _ => "",
        }
    }

    // The number of a member, and NaN where there is none.
    pub fn number(&self, key: &str) -> f64 {
        match self.get(key) {
            Some(Json::Number(number)) => *number,
            _ => f64::NAN,
        }
    }

    pub fn list(&self, key: &str) -> &[Json] {
        match self.get(key) {
            Some(Json::List(values)) => values,
            _ => &[],
        }
    }

    pub fn numbers(&self, key: &str) -> Vec<f64> {
        let number = |value: &Json| if let Json::Number(n) = value { *n } else { f64::NAN };
        self.list(key).iter().map(number).collect()
    }

    pub fn texts(&self, key: &str) -> Vec<&str> {
        let text = |value| if let &Json::Text(ref text) = value { text } else { "" };
        self.list(key).iter().map(text).collect()
    }
}

impl Vectors {
    // Reads the manifest.
    pub fn open(folder: impl AsRef<Path>) -> Result<Vectors, String> {
        let name = "manifest.json";
        let folder = folder.as_ref().to_path_buf();
        let bytes = fs::read(folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
        let manifest = parse(&bytes).ok_or(format!("{name}: it must be JSON"))?;
        let format = manifest.number("format");
        if format != FORMAT {
            return Err(format!("{name}: format must be {FORMAT}, got {format}"));
        }
        Ok(Vectors { manifest, folder, arrays: HashMap::new() })
    }

    // Reads the arrays of all cases, with inputs of a dtype, in the place of those read before.
    pub fn load(&mut self, dtype: &str) -> Result<(), String> {
        let name = match self.manifest.get("files").map(|files| files.text(dtype)) {
            Some(name) if !name.is_empty() => name,
            _ => return Err(format!("manifest.json: files must have the dtype {dtype}")),
        };
        let bytes = fs::read(self.folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
        let rule = format!("{name}: it must be a file of safetensors");
        let length = bytes.first_chunk().map(|&first| u64::from_le_bytes(first)).ok_or(&rule)?;
        let start =
            usize::try_from(length).ok().and_then(|length| length.checked_add(8)).ok_or(&rule)?;
        let header = bytes.get(8..start).and_then(parse).ok_or(&rule)?;
        let Json::Object(members) = header else { return Err(rule) };
        self.arrays.clear();
        for (name, entry) in members {
            if name != "__metadata__" {
                let array = array(&entry, &bytes[start..]).ok_or(format!(
                    "{name}: its dtype, its shape and its offsets must fit the file"
                ))?;
                self.arrays.insert(name, array);
            }
        }
        Ok(())
    }

    pub fn dtypes(&self) -> Vec<String> {
        match self.manifest.get("files") {
            Some(Json::Object(members)) => members.iter().map(|(name, _)| name.clone()).collect(),
            _ => Vec::new(),
        }
    }

    pub fn cases(&self) -> &[Json] {
        self.manifest.list("cases")
    }

    // Returns an array of a case. `group` is inputs, expected or bound.
    pub fn find(&self, entry: &Json, group: &str, name: &str) -> Result<&Array, String> {
        let case = entry.text("name");
        let found = self.arrays.get(&format!("{case}/{group}/{name}"));
        found.ok_or(format!("{case}: there is no {group}/{name}"))
    }
}

fn array(entry: &Json, bytes: &[u8]) -> Option<Array> {
    let whole = |n: f64| (n >= 0.0 && n.fract() == 0.0 && n < 1e15).then_some(n as usize);
    let sizes = |key| entry.numbers(key).into_iter().map(whole).collect::<Option<Vec<usize>>>();
    let shape = sizes("shape")?;
    let [start, stop] = sizes("data_offsets")?[..] else { return None };
    let raw = bytes.get(start..stop)?;
    let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size))?;
    let data: Vec<f64> = match entry.text("dtype") {
        "F64" => numbers(raw, f64::from_le_bytes)?,
        "F32" => numbers(raw, |four| f32::from_le_bytes(four).into())?,
        "I32" => numbers(raw, |four| i32::from_le_bytes(four).into())?,
        _ => return None,
    };
    (data.len() == count).then_some(Array { shape, data })
}

// Converts the bytes of each number. Returns None where some bytes are left.
fn numbers<const N: usize>(raw: &[u8], convert: impl Fn([u8; N]) -> f64) -> Option<Vec<f64>> {
    raw.chunks(N).map(|bytes| bytes.try_into().ok().map(&convert)).collect()
}

// JSON. The functions return None where the text is not JSON.

pub fn parse(bytes: &[u8]) -> Option<Json> {
    let mut parser = Parser { text: std::str::from_utf8(bytes).ok()?, depth: 0 };
    let value = parser.value()?;
    parser.skip_spaces();
    parser.text.is_empty().then_some(value)
}

struct Parser<'a> {
    text: &'a str, // that is not read yet
    depth: usize,
}

impl Parser<'_> {
    fn skip_spaces(&mut self) {
        self.text = self.text.trim_start_matches([' ', '\t', '\r', '\n']);
    }

    // Reads a word where it comes next; returns whether it did.
    fn takes(&mut self, word: &str) -> bool {
        let rest = self.text.strip_prefix(word);
        self.text = rest.unwrap_or(self.text);
        rest.is_some()
    }

    fn value(&mut self) -> Option<Json> {
        self.skip_spaces();
        for (word, value) in [("null", Json::Null), ("true", Json::Bool), ("false", Json::Bool)] {
            if self.takes(word) {
                return Some(value);
            }
        }
        if self.text.starts_with('"') {
            return self.string().map(Json::Text);
        }
        if self.takes("[") {
            return self.members("]", Self::value).map(Json::List);
        }
        if self.takes("{") {
            return self.members("}", Self::pair).map(Json::Object);
        }
        let other = |c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E');
        let (number, rest) = self.text.split_at(self.text.find(other).unwrap_or(self.text.len()));
        self.text = rest;
        number.parse().ok().map(Json::Number)
    }

    fn pair(&mut self) -> Option<(String, Json)> {
        self.skip_spaces();
        let key = self.string()?;
        self.skip_spaces();
        self.takes(":").then(|| self.value())?.map(|value| (key, value))
    }

    fn members<T>(&mut self, end: &str, read: fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut found = Vec::new();
        self.skip_spaces();
        if self.takes(end) {
            return Some(found);
        }
        if self.depth == DEPTH {
            return None;
        }
        self.depth += 1;
        loop {
            found.push(read(self)?);
            self.skip_spaces();
            if self.takes(end) {
                self.depth -= 1;
                return Some(found);
            }
            if !self.takes(",") {
                return None;
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        let mut found = String::new();
        if !self.takes("\"") {
            return None;
        }
        loop {
            let next = self.text.find(['"', '\\'])?;
            found.push_str(&self.text[..next]);
            self.text = &self.text[next..];
            if self.takes("\"") {
                return Some(found);
            }
            let escape = self.text.chars().nth(1)?;
            self.text = &self.text[1 + escape.len_utf8()..];
            found.push(match escape {
                'b' => '\u{8}',
                'f' => '\u{c}',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                '"' | '\\' | '/' => escape,
                'u' => self.code()?,
                _ => return None,
            });
        }
    }

    // Reads the four digits of a code; a pair of codes is one character.
    fn code(&mut self) -> Option<char> {
        let first = self.digits()?;
        if !(0xD800..0xDC00).contains(&first) {
            return char::from_u32(first);
        }
        let low = self.takes("\\u").then(|| self.digits())??;
        let low = low.checked_sub(0xDC00).filter(|&low| low < 0x400)?;
        char::from_u32(0x10000 + ((first - 0xD800) << 10) + low)
    }

    fn digits(&mut self) -> Option<u32> {
        let (four, rest) = (self.text.get(..4)?, self.text.get(4..)?);
        self.text = rest;
        u32::from_str_radix(four, 16).ok()
    }
}
