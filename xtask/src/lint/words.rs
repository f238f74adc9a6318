//! Checks the language of the project: words that docs/glossary.md and CONTRIBUTING.md replace with the field's terms.

use crate::tools;
use anyhow::{Result, bail};

/// What is rejected, in any case and as a part of an identifier, and what to write instead. More than one word: a phrase.
const BANNED: [(&str, &str); 24] = [
    ("told", "reported, returned, known, stated"),
    ("tell", "report, return, state; to tell apart is to distinguish"),
    ("tells", "reports, returns, states"),
    ("telling", "reporting, distinguishing"),
    ("whom", "which user, which process"),
    ("whose", "of which, with, its"),
    ("anew", "again"),
    ("beside", "next to, in addition to, during"),
    ("nobody", "no user, no process, unattributed"),
    ("somebody", "a user, a process"),
    ("anybody", "any user"),
    ("everybody", "every user"),
    ("believe", "trust, accept"),
    ("believes", "trusts, accepts"),
    ("believed", "trusted, accepted"),
    ("looked at", "read, examined"),
    ("looks at", "reads, examines"),
    ("became of", "the result of"),
    ("came of", "the result of"),
    ("gone round", "wrapped"),
    ("went round", "wrapped"),
    ("for good", "permanently"),
    ("is no", "is not a, is not"),
    ("are no", "are not"),
];
/// "There is no such file" and "is no longer" are plain English; `no_pid` is a name.
const NEGATIONS: [&str; 2] = ["is no", "are no"];
const BEFORE_NEGATION: [&str; 3] = ["there", "here", "where"];
const AFTER_NEGATION: [&str; 6] = ["longer", "more", "less", "later", "earlier", "pid"];

const READ: [&str; 9] = [".rs", ".md", ".html", ".js", ".css", ".toml", ".yml", ".yaml", ".sh"];
/// Recorded from elsewhere, or this list itself.
const EXEMPT: [&str; 2] = ["tests/fixtures/", "xtask/src/lint/words.rs"];

pub fn check() -> Result<()> {
    tools::progress("plain language");
    let mut found = 0;
    for (name, text) in tools::tracked_texts()? {
        if !READ.iter().any(|end| name.ends_with(end)) || EXEMPT.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for (banned, instead) in banned_in(line) {
                eprintln!("{name}:{}: `{banned}`: write {instead}", number + 1);
                found += 1;
            }
        }
    }
    match found {
        0 => Ok(()),
        _ => bail!("{found} words to replace; docs/glossary.md has the terms"),
    }
}

/// Lower-case words; `snake_case` and `CamelCase` are taken apart.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for c in line.chars() {
        let begins = c.is_uppercase() && before.is_lowercase();
        if (begins || !c.is_alphabetic()) && words.last().is_some_and(|word| !word.is_empty()) {
            words.push(String::new());
        }
        if c.is_alphabetic()
            && let Some(word) = words.last_mut()
        {
            word.extend(c.to_lowercase());
        }
        before = c;
    }
    words
}

fn banned_in(line: &str) -> Vec<(&'static str, &'static str)> {
    let words = words(line);
    let is_there = |phrase: &str| {
        let phrase: Vec<&str> = phrase.split(' ').collect();
        words.windows(phrase.len()).enumerate().any(|(at, window)| {
            let allowed = NEGATIONS.contains(&phrase.join(" ").as_str())
                && (at.checked_sub(1).is_some_and(|before| BEFORE_NEGATION.contains(&words[before].as_str()))
                    || words.get(at + phrase.len()).is_some_and(|after| AFTER_NEGATION.contains(&after.as_str())));
            window == phrase.as_slice() && !allowed
        })
    };
    BANNED.into_iter().filter(|(phrase, _)| is_there(phrase)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planted_word_is_found_in_prose_and_in_names() {
        for line in [
            "the driver told us",
            "fn told_at()",
            "struct Told;",
            "a user whose GPU",
            "this is no container",
            "what became of it",
        ] {
            assert!(!banned_in(line).is_empty(), "{line}");
        }
        for line in ["there is no such file", "it is no longer there", "if x.is_none()", "retold", "the driver reports"] {
            assert!(banned_in(line).is_empty(), "{line}: {:?}", banned_in(line));
        }
    }
}
