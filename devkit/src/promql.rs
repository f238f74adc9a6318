//! What a PromQL expression refers to: metric names, and labels with the place where each is used.
//!
//! A scanner, not a parser: it does not check the syntax. Prometheus does that in the tests, with every expression that this is used for.
//! Variables of Grafana, such as `$instance` and `$__rate_interval`, may stand in strings and durations.

/// One reference of an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    Metric(String),
    /// In the braces of a selector.
    Matcher {
        label: String,
        value: String,
    },
    /// In `by (..)`, `on (..)` and other lists.
    Listed(String),
}

/// Words in front of a list of labels.
const LISTS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
const OPERATORS: [&str; 8] = ["and", "or", "unless", "bool", "offset", "atan2", "inf", "nan"];
/// The arguments of `label_replace`, counted from 0, that are labels.
const LABEL_ARGUMENTS: [usize; 2] = [1, 3];

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Text(String),
    Sign(char),
}

fn tokens(expr: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = expr.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '"' | '\'' => {
                let mut text = String::new();
                while let Some(inside) = rest.next().filter(|inside| *inside != c) {
                    text.push(inside);
                    if inside == '\\' {
                        text.extend(rest.next());
                    }
                }
                tokens.push(Token::Text(text));
            }
            '[' => while rest.next().is_some_and(|inside| inside != ']') {},
            '$' => while rest.next_if(|next| next.is_alphanumeric() || *next == '_').is_some() {},
            c if c.is_ascii_digit() => while rest.next_if(|next| next.is_alphanumeric() || *next == '.').is_some() {},
            c if c.is_alphabetic() || c == '_' => {
                let mut word = String::from(c);
                while let Some(next) = rest.next_if(|next| next.is_alphanumeric() || "_:".contains(*next)) {
                    word.push(next);
                }
                tokens.push(Token::Word(word));
            }
            c if c.is_whitespace() => {}
            c => tokens.push(Token::Sign(c)),
        }
    }
    tokens
}

/// The words up to the closing bracket, and the number of tokens that they take.
fn list(tokens: &[Token]) -> (Vec<String>, usize) {
    let end = tokens.iter().position(|token| *token == Token::Sign(')')).unwrap_or(tokens.len());
    let words = tokens[..end].iter().filter_map(|token| match token {
        Token::Word(word) => Some(word.clone()),
        _ => None,
    });
    (words.collect(), end)
}

/// The labels that a call of `label_replace` names in strings.
fn named_in_strings(tokens: &[Token]) -> Vec<String> {
    let (mut depth, mut argument, mut labels) = (0, 0, Vec::new());
    for token in tokens {
        match token {
            Token::Sign('(' | '{') => depth += 1,
            Token::Sign(')' | '}') if depth == 1 => break,
            Token::Sign(')' | '}') => depth -= 1,
            Token::Sign(',') if depth == 1 => argument += 1,
            Token::Text(text) if depth == 1 && LABEL_ARGUMENTS.contains(&argument) => labels.push(text.clone()),
            _ => {}
        }
    }
    labels
}

/// In the order of the expression.
pub fn references(expr: &str) -> Vec<Reference> {
    let tokens = tokens(expr);
    let mut found = Vec::new();
    let (mut at, mut in_braces) = (0, false);
    while let Some(token) = tokens.get(at) {
        let next = tokens.get(at + 1);
        match token {
            Token::Sign('{') => in_braces = true,
            Token::Sign('}') => in_braces = false,
            Token::Word(label) if in_braces => {
                let text = tokens[at..].iter().find_map(|token| match token {
                    Token::Text(text) => Some(text.clone()),
                    _ => None,
                });
                found.push(Reference::Matcher { label: label.clone(), value: text.unwrap_or_default() });
            }
            Token::Word(word) if LISTS.contains(&word.as_str()) && next == Some(&Token::Sign('(')) => {
                let (labels, length) = list(&tokens[at + 2..]);
                found.extend(labels.into_iter().map(Reference::Listed));
                at += length + 2;
            }
            Token::Word(word) if LISTS.contains(&word.as_str()) || OPERATORS.contains(&word.to_lowercase().as_str()) => {}
            // `sum by (x) (..)`: an aggregation is followed by its list instead of a bracket.
            Token::Word(word) if next == Some(&Token::Sign('(')) => {
                let labels = if word == "label_replace" { named_in_strings(&tokens[at + 1..]) } else { Vec::new() };
                found.extend(labels.into_iter().map(Reference::Listed));
            }
            Token::Word(_) if matches!(next, Some(Token::Word(word)) if matches!(word.as_str(), "by" | "without")) => {}
            Token::Word(metric) => found.push(Reference::Metric(metric.clone())),
            _ => {}
        }
        at += 1;
    }
    found
}

/// Labels in a legend such as `{{pod}} on {{uuid}}`, and in the templates of alerts (`{{ $labels.uuid }}`).
pub fn labels_of_template(template: &str) -> Vec<String> {
    let parts = template.split("{{").skip(1).filter_map(|part| part.split_once("}}").map(|(inside, _)| inside.trim()));
    let label = |inside: &str| {
        let name = if inside.starts_with('$') { inside.strip_prefix("$labels.")? } else { inside };
        Some(name.split_whitespace().next()?.to_owned())
    };
    parts.filter_map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(expr: &str, expect: &[&str]) {
        let shown = |reference: Reference| match reference {
            Reference::Metric(name) => name,
            Reference::Matcher { label, value } => format!("{label}={value}"),
            Reference::Listed(label) => format!("({label})"),
        };
        assert_eq!(references(expr).into_iter().map(shown).collect::<Vec<_>>(), expect, "{expr}");
    }

    #[test]
    fn names_matchers_and_lists_are_found() {
        check("up", &["up"]);
        check("a_total{x=\"1\", y=~\"$pod|b\"} > 0", &["a_total", "x=1", "y=$pod|b"]);
        check("sum by (x, y) (rate(a_total[$__rate_interval])) / 1e3", &["(x)", "(y)", "a_total"]);
        check("sum(rate(a_total{x!=\"}\"}[5m])) without (z)", &["a_total", "x=}", "(z)"]);
        check("a:b:c and on (i) group_left () (2 * d)", &["a:b:c", "(i)", "d"]);
        check("topk(20, sum by (p) (increase(a[$__range])))", &["(p)", "a"]);
        check("a offset 15m unless a", &["a", "a"]);
        check("label_replace(a{k=\"v\"}, \"to\", \"$1\", \"from\", \"(.*)\")", &["(to)", "(from)", "a", "k=v"]);
    }

    #[test]
    fn templates_name_labels() {
        assert_eq!(labels_of_template("{{pod}} on {{ uuid }}"), ["pod", "uuid"]);
        assert_eq!(labels_of_template("{{ $value | humanize }} of {{ $labels.uuid }}"), ["uuid"]);
        assert_eq!(labels_of_template("plain"), [""; 0]);
    }
}
