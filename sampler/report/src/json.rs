//! The report for programs. Its shape is the model's serialization, which only grows.

use super::model::Report;

/// Pretty-printed, with a newline at the end.
pub fn json(report: &Report) -> String {
    pretty(report)
}

pub(super) fn pretty(what: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string_pretty(what).expect("every key is a string, and nothing else can fail in memory");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::sample;

    fn parsed() -> Value {
        let text = json(&sample::report());
        assert!(text.ends_with("}\n"));
        serde_json::from_str(&text).unwrap()
    }

    /// Every key of the contract, with its type: s(tring), n(umber), b(ool), l(ist), o(bject), p(air of numbers); `?` if it may be null.
    fn check(value: &Value, keys: &str) {
        for key in keys.split_whitespace() {
            let (name, kind) = key.split_once(':').unwrap();
            let one = value.get(name).unwrap_or_else(|| panic!("no {name} in {value}"));
            let good = match kind.trim_end_matches('?') {
                "s" => one.is_string(),
                "n" => one.is_number(),
                "b" => one.is_boolean(),
                "l" => one.is_array(),
                "o" => one.is_object(),
                "p" => one.as_array().is_some_and(|pair| pair.len() == 2 && pair.iter().all(Value::is_number)),
                other => panic!("{other}"),
            };
            assert!(good || (kind.ends_with('?') && one.is_null()), "{name}: {one}");
        }
    }

    #[test]
    fn has_the_keys_it_promises() {
        let report = parsed();
        check(&report, "format:n start:s duration_seconds:n truncated:b gaps:l gpus:l users:l findings:l damage:l node:s");
        for gap in report["gaps"].as_array().unwrap() {
            check(gap, "uuid:s from:s to:s reason:s");
        }
        for gpu in report["gpus"].as_array().unwrap() {
            check(gpu, "uuid:s model:s busy_seconds:n idle_seconds:n unobserved_seconds:n unattributed_seconds:n unattributed:o");
        }
        for user in report["users"].as_array().unwrap() {
            check(user, "kind:s id:s namespace:s pod:s container:s name:s image:s gpus:l");
            for usage in user["gpus"].as_array().unwrap() {
                check(usage, "uuid:s gpu_seconds:n share_of_busy:n? share_stderr:n? samples:n active_seconds:n");
                check(usage, "coactive_seconds:n memory_max_bytes:n? contenders:l causes:l");
                for contender in usage["contenders"].as_array().unwrap() {
                    check(contender, "kind:s id:s gpu_seconds:n evidence:s rate_before:n? rate_after:n? transitions:n");
                    check(contender, "interval:p? interval_level:n?");
                }
                for cause in usage["causes"].as_array().unwrap() {
                    check(cause, "cause:s verdict:s detail:s");
                }
            }
        }
    }

    #[test]
    fn names_of_enums_are_those_of_the_contract() {
        let report = parsed();
        let user = &report["users"][0];
        assert_eq!(user["kind"], "container");
        assert_eq!(user["gpus"][0]["contenders"][0]["evidence"], "on-off-confirmed");
        assert_eq!(user["gpus"][0]["causes"][0]["cause"], "gpu-clocks");
        assert_eq!(user["gpus"][0]["causes"][0]["verdict"], "ruled-out");
        assert_eq!(report["start"], "2026-05-04T10:00:00.000Z");
    }
}
