//! Parses a metrics page: the sample lines of the text format.

use std::collections::BTreeMap;

#[derive(Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Sample {
    /// Empty if the label is absent, as in Prometheus' data model.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// Lines that are not samples are ignored.
pub fn parse(page: &str) -> Vec<Sample> {
    page.lines().filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(label.trim().to_owned(), value);
            rest = after;
        }
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quote, unescaped, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, text.get(at + 1..)?)),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    type Expect<'a> = Option<(&'a str, &'a [(&'a str, &'a str)], f64)>;

    fn check(line: &str, expect: Expect<'_>) {
        let expect = expect.map(|(name, labels, value)| Sample {
            name: name.into(),
            labels: labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            value,
        });
        assert_eq!(sample(line), expect, "{line}");
    }

    #[test]
    fn sample_lines_are_parsed() {
        check("up 1", Some(("up", &[], 1.0)));
        check("x_total{a=\"b\",c=\"\"} 2.5e3 1700000000", Some(("x_total", &[("a", "b"), ("c", "")], 2500.0)));
        check("x{a=\"q\\\"{},=\\\\\\n\"} 1", Some(("x", &[("a", "q\"{},=\\\n")], 1.0)));
        check("x{a=\"b\",} +Inf", Some(("x", &[("a", "b")], f64::INFINITY)));
        check("# HELP up is it", None);
        check("x{a=\"b", None);
        check("", None);
    }
}
