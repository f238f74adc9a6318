//! The `json` format: the serialization of the model, to which fields are only added.

/// Pretty-printed, with a newline at the end.
pub fn json(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("all keys are strings, and writing to memory does not fail");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::sample;

    fn sample_report() -> Value {
        let text = json(&sample::report());
        assert!(text.ends_with("}\n"));
        serde_json::from_str(&text).unwrap()
    }

    /// Checks that each of the keys has its type: s(tring), n(umber), b(ool), l(ist), o(bject), p(air of numbers); `?` if it may be null.
    fn check(value: &Value, keys: &str) {
        for key in keys.split_whitespace() {
            let (name, kind) = key.split_once(':').unwrap();
            let field = value.get(name).unwrap_or_else(|| panic!("no {name} in {value}"));
            let matches = match kind.trim_end_matches('?') {
                "s" => field.is_string(),
                "n" => field.is_number(),
                "b" => field.is_boolean(),
                "l" => field.is_array(),
                "o" => field.is_object(),
                "p" => field.as_array().is_some_and(|pair| pair.len() == 2 && pair.iter().all(Value::is_number)),
                other => panic!("{other}"),
            };
            assert!(matches || (kind.ends_with('?') && field.is_null()), "{name}: {field}");
        }
    }

    #[test]
    fn json_has_the_documented_keys_and_types() {
        let report = sample_report();
        check(&report, "format:n start:s duration_seconds:n truncated:b gaps:l gpus:l users:l findings:l damage:l node:s");
        for gap in report["gaps"].as_array().unwrap() {
            check(gap, "uuid:s from:s to:s reason:s");
        }
        for gpu in report["gpus"].as_array().unwrap() {
            check(gpu, "uuid:s model:s busy_seconds:n idle_seconds:n unobserved_seconds:n unattributed_seconds:n unattributed:o");
        }
        for user in report["users"].as_array().unwrap() {
            check(user, "kind:s id:s namespace:s pod:s container:s name:s image:s gpus:l");
            if let Some(waits) = user.get("waits") {
                check(waits, "probed_seconds:n wait_seconds:n calls:n call_seconds:o? unprobed_processes:n problems:l");
            }
            for usage in user["gpus"].as_array().unwrap() {
                check(usage, "uuid:s gpu_seconds:n share_of_busy:n? share_stderr:n? samples:n active_seconds:n");
                check(usage, "coactive_seconds:n memory_max_bytes:n? contenders:l causes:l");
                for contender in usage["contenders"].as_array().unwrap() {
                    check(contender, "kind:s id:s gpu_seconds:n evidence:s rate_before:n? rate_after:n? transitions:n");
                    check(contender, "interval:p? interval_level:n? on_off_confirmed:b");
                    if let Some(demand) = contender.get("demand") {
                        check(
                            demand,
                            "basis:s wait_rate_most:n? wait_rate:n? interval:p? wait_seconds:n? windows_with:n windows_without:n transitions:n",
                        );
                    }
                }
                for cause in usage["causes"].as_array().unwrap() {
                    check(cause, "cause:s verdict:s detail:s");
                }
            }
        }
    }

    #[test]
    fn enums_are_serialized_by_their_documented_names() {
        let report = sample_report();
        let user = &report["users"][0];
        assert_eq!(user["kind"], "container");
        assert_eq!(user["gpus"][0]["contenders"][0]["evidence"], "demand-confirmed");
        assert_eq!(user["gpus"][0]["causes"][0]["cause"], "gpu-clocks");
        assert_eq!(user["gpus"][0]["causes"][0]["verdict"], "ruled-out");
        assert_eq!(report["start"], "2026-05-04T10:00:00.000Z");
    }
}
