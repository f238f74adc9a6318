//! Dashboards, recording rules, alerts and runbooks: names and labels that the metric catalogue has, the structure of the dashboards, a
//! test and a runbook for each alert.
//!
//! The structure is that of Grafana's documented JSON model as far as these dashboards use it. `tests/monitoring.rs` compares with Grafana
//! Labs' own model, and runs every query.

use crate::{dashboards, dashboards::catalogue::Catalogue, tools};
use anyhow::{Context as _, Result, bail};
use devkit::promql::labels_of_template;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

const RULES: &str = "deploy/prometheus/rules.yml";
const RULE_TESTS: &str = "deploy/prometheus/rules.test.yml";
const RUNBOOKS: &str = "docs/runbooks";
/// Every runbook has these parts.
const HEADINGS: [&str; 4] = ["## Symptom", "## Evidence", "## Impact", "## Remedy"];
const SEVERITIES: [&str; 3] = ["info", "warning", "critical"];
const GRID_COLUMNS: u64 = 24;
/// Variables that Grafana has by itself.
const BUILT_IN: [&str; 4] = ["__rate_interval", "__range", "__data", "__url_time_range"];

pub fn check() -> Result<()> {
    tools::progress("dashboards, rules and runbooks");
    dashboards::check()?;
    let read = |file: &str| fs::read_to_string(tools::root().join(file)).with_context(|| file.to_owned());
    let rules = Rules::parse(&read(RULES)?)?;
    let catalogue = Catalogue::read()?;
    let mut problems = rules.problems(&catalogue);
    problems.extend(rules.untested(&serde_saphyr::from_str(&read(RULE_TESTS)?).context(RULE_TESTS)?));
    problems.extend(rules.without_runbook()?);
    for (file, text) in dashboards::rendered()? {
        let dashboard: Value = serde_json::from_str(&text)?;
        problems.extend(
            problems_of_dashboard(&dashboard, &catalogue, &rules).into_iter().map(|problem| format!("{file}: {problem}")),
        );
    }
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    match problems.len() {
        0 => Ok(()),
        n => bail!("{n} problems in dashboards, rules or runbooks"),
    }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

struct Rules {
    /// Series of recording rules with their expressions.
    recorded: BTreeMap<String, String>,
    alerts: Vec<Value>,
}

impl Rules {
    fn parse(yaml: &str) -> Result<Self> {
        let file: Value = serde_saphyr::from_str(yaml).context(RULES)?;
        let rules = list(&file, "/groups").iter().flat_map(|group| list(group, "/rules"));
        let (recording, alerts): (Vec<&Value>, Vec<&Value>) = rules.partition(|rule| rule.get("record").is_some());
        let recorded = recording.iter().map(|rule| (text(rule, "/record").to_owned(), text(rule, "/expr").to_owned())).collect();
        let rules = Self { recorded, alerts: alerts.into_iter().cloned().collect() };
        if rules.recorded.is_empty() || rules.alerts.is_empty() {
            bail!("{RULES} has no recording rules or no alerts");
        }
        Ok(rules)
    }

    fn names(&self) -> BTreeSet<String> {
        self.alerts.iter().map(|alert| text(alert, "/alert").to_owned()).collect()
    }

    fn problems(&self, catalogue: &Catalogue) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, expr) in &self.recorded {
            problems
                .extend(catalogue.check(expr, &self.recorded).1.into_iter().map(|problem| format!("{RULES}: {name}: {problem}")));
            if name.split(':').count() != 3 {
                problems.push(format!("{RULES}: {name} is not level:metric:operation"));
            }
        }
        for alert in &self.alerts {
            let name = text(alert, "/alert");
            let (known, mut found) = catalogue.check(text(alert, "/expr"), &self.recorded);
            for annotation in ["summary", "description", "runbook_url"] {
                let template = text(alert, &format!("/annotations/{annotation}"));
                if template.is_empty() {
                    found.push(format!("no {annotation}"));
                }
                let unknown = labels_of_template(template).into_iter().filter(|label| !known.contains(label));
                found.extend(
                    unknown.map(|label| format!("{annotation} has the label {label}, which no series of the expression has")),
                );
            }
            if !SEVERITIES.contains(&text(alert, "/labels/severity")) {
                found.push(format!("severity is not one of {}", SEVERITIES.join(", ")));
            }
            problems.extend(found.into_iter().map(|problem| format!("{RULES}: {name}: {problem}")));
        }
        problems
    }

    /// Alerts without a test that they fire or that they do not, recorded series that no test queries.
    fn untested(&self, tests: &Value) -> Vec<String> {
        let (mut firing, mut silent, mut queried) = (BTreeSet::new(), BTreeSet::new(), String::new());
        for test in list(tests, "/tests") {
            for alert in list(test, "/alert_rule_test") {
                let set = if list(alert, "/exp_alerts").is_empty() { &mut silent } else { &mut firing };
                set.insert(text(alert, "/alertname"));
            }
            list(test, "/promql_expr_test").iter().for_each(|test| queried.push_str(text(test, "/expr")));
        }
        let names = self.names();
        let missing = |set: &BTreeSet<&str>, what: &str| {
            let untested = names.iter().filter(|name| !set.contains(name.as_str()));
            untested.map(|name| format!("{RULE_TESTS}: no test in which {name} {what}")).collect::<Vec<_>>()
        };
        let recorded = self.recorded.keys().filter(|name| !queried.contains(name.as_str()));
        let recorded = recorded.map(|name| format!("{RULE_TESTS}: no test of {name}"));
        [missing(&firing, "fires"), missing(&silent, "does not fire")].into_iter().flatten().chain(recorded).collect()
    }

    fn without_runbook(&self) -> Result<Vec<String>> {
        let (mut problems, mut pages) = (Vec::new(), BTreeSet::new());
        for entry in fs::read_dir(tools::root().join(RUNBOOKS)).context(RUNBOOKS)? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let page = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            for heading in HEADINGS.iter().filter(|heading| !page.lines().any(|line| line == **heading)) {
                problems.push(format!("{RUNBOOKS}/{name}.md has no part {heading:?}"));
            }
            if !page.starts_with(&format!("# {name}\n")) {
                problems.push(format!("{RUNBOOKS}/{name}.md does not begin with its name"));
            }
            pages.insert(name);
        }
        for alert in &self.alerts {
            let name = text(alert, "/alert");
            if text(alert, "/annotations/runbook_url") != format!("{RUNBOOKS}/{name}.md") {
                problems.push(format!("{RULES}: {name}: runbook_url is not {RUNBOOKS}/{name}.md"));
            }
        }
        let names = self.names();
        problems.extend(names.difference(&pages).map(|name| format!("{RUNBOOKS}/{name}.md is missing")));
        problems.extend(pages.difference(&names).map(|name| format!("{RUNBOOKS}/{name}.md: there is no such alert")));
        Ok(problems)
    }
}

/// Names after `$` and `${`.
fn variables_in(text: &str) -> Vec<&str> {
    let name = |rest: &str| rest.trim_start_matches('{').split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::len);
    let found = text.match_indices('$').filter_map(|(at, _)| {
        let rest = text[at + 1..].trim_start_matches('{');
        Some(&rest[..name(rest)?])
    });
    found.filter(|name| name.starts_with(|c: char| c.is_alphabetic() || c == '_')).collect()
}

fn problems_of_dashboard(dashboard: &Value, catalogue: &Catalogue, rules: &Rules) -> Vec<String> {
    let mut problems = Vec::new();
    let defined: BTreeSet<&str> = list(dashboard, "/templating/list").iter().map(|variable| text(variable, "/name")).collect();
    let mut used = BTreeSet::new();
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for variable in list(dashboard, "/templating/list").iter().filter(|variable| text(variable, "/type") == "query") {
        used.extend(variables_in(text(variable, "/query/query")));
        let definition = text(variable, "/query/query");
        let inner = definition
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'))
            .and_then(|rest| rest.rsplit_once(", "));
        match inner {
            Some((selector, label)) => {
                let (known, found) = catalogue.check(selector, &rules.recorded);
                problems.extend(found);
                if !known.contains(label) {
                    problems.push(format!("{definition}: no such label"));
                }
            }
            None => problems.push(format!("{definition} is not label_values(SELECTOR, LABEL)")),
        }
    }
    for panel in list(dashboard, "/panels") {
        let title = text(panel, "/title");
        let mut problem = |what: String| problems.push(format!("panel {title:?}: {what}"));
        if !panel["id"].as_u64().is_some_and(|id| ids.insert(id)) {
            problem("the id is not unique".to_owned());
        }
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap_or_default();
        if at("w") == 0 || at("h") == 0 || at("x") + at("w") > GRID_COLUMNS {
            problem("not within the grid".to_owned());
        }
        let own = (at("y")..at("y") + at("h")).flat_map(|y| (at("x")..at("x") + at("w")).map(move |x| (x, y)));
        if own.filter(|cell| !cells.insert(*cell)).count() > 0 {
            problem("it overlaps another panel".to_owned());
        }
        if text(panel, "/type") == "row" {
            continue;
        }
        if text(panel, "/description").is_empty() || text(panel, "/fieldConfig/defaults/unit").is_empty() {
            problem("no description or no unit".to_owned());
        }
        if list(panel, "/targets").is_empty() {
            problem("no query".to_owned());
        }
        for target in list(panel, "/targets") {
            let expr = text(target, "/expr");
            used.extend(variables_in(expr));
            if [panel, target].iter().any(|part| text(part, "/datasource/uid") != "${datasource}") {
                problem("its data source is not the variable".to_owned());
            }
            let (known, found) = catalogue.check(expr, &rules.recorded);
            found.into_iter().for_each(&mut problem);
            for label in labels_of_template(text(target, "/legendFormat")).iter().filter(|label| !known.contains(*label)) {
                problem(format!("the legend has the label {label}, which no series of the query has"));
            }
        }
        for link in list(panel, "/fieldConfig/defaults/links") {
            used.extend(variables_in(text(link, "/url")));
        }
    }
    problems.extend(
        used.iter()
            .filter(|name| !defined.contains(*name) && !BUILT_IN.contains(name))
            .map(|name| format!("${name} is not defined")),
    );
    let unused = defined.iter().filter(|name| **name != "datasource" && !used.contains(*name));
    problems.extend(unused.map(|name| format!("the variable {name} is not used")));
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const METRICS: &str = "| `gpus` | yes | 0 |\n| `gpu_a_total` | `gpus` | counter | | seconds | `uuid` | A. | never |\n";
    const GOOD: &str = "groups:\n- rules:\n  - record: uuid:gpu_a:rate5m\n    expr: sum by (uuid) (rate(gpu_a_total[5m]))\n\
        \x20 - alert: Good\n    expr: uuid:gpu_a:rate5m > 1\n    labels: {severity: info}\n    annotations:\n\
        \x20     {summary: '{{ $labels.uuid }}', description: d, runbook_url: docs/runbooks/Good.md}\n";

    fn catalogue() -> Catalogue {
        Catalogue::parse(METRICS).expect("a catalogue")
    }

    fn check_rules(change: (&str, &str), expect: Option<&str>) {
        let rules = Rules::parse(&GOOD.replace(change.0, change.1)).expect("rules");
        let problems = rules.problems(&catalogue());
        assert_eq!(problems.is_empty(), expect.is_none(), "{change:?}: {problems:?}");
        assert!(expect.is_none_or(|word| problems.iter().any(|problem| problem.contains(word))), "{change:?}: {problems:?}");
    }

    #[test]
    fn rules_name_only_what_the_catalogue_has() {
        check_rules(("", ""), None);
        check_rules(("gpu_a_total", "gpu_b_total"), Some("gpu_b_total"));
        check_rules(("by (uuid)", "by (pod)"), Some("label pod"));
        check_rules(("$labels.uuid", "$labels.pod"), Some("label pod"));
        check_rules(("info", "urgent"), Some("severity"));
        check_rules(("description: d, ", ""), Some("description"));
        check_rules(("uuid:gpu_a:rate5m", "gpu_a"), Some("level:metric:operation"));
    }

    #[test]
    fn an_alert_needs_a_test_in_which_it_fires_and_one_in_which_it_does_not() {
        let rules = Rules::parse(GOOD).expect("rules");
        let fires = json!({"alertname": "Good", "exp_alerts": [{}]});
        let silent = json!({"alertname": "Good", "exp_alerts": []});
        let query = json!([{"expr": "uuid:gpu_a:rate5m"}]);
        let count = |alerts: Value, queries: &Value| {
            rules.untested(&json!({"tests": [{"alert_rule_test": alerts, "promql_expr_test": queries}]})).len()
        };
        assert_eq!(count(json!([fires, silent]), &query), 0);
        assert_eq!(count(json!([fires]), &query), 1);
        assert_eq!(count(json!([silent]), &query), 1);
        assert_eq!(count(json!([fires, silent]), &json!([])), 1);
    }

    fn check_dashboard(pointer: &str, value: Value, expect: &str) {
        let panel = |id: u64, x: u64| {
            json!({"id": id, "title": "A", "type": "stat", "description": "A.", "gridPos": {"x": x, "y": 0, "w": 4, "h": 4},
                "datasource": {"uid": "${datasource}"}, "fieldConfig": {"defaults": {"unit": "s"}},
                "targets": [{"expr": "gpu_a_total{uuid=~\"$uuid\"}", "legendFormat": "{{uuid}}", "datasource": {"uid": "${datasource}"}}]})
        };
        let mut dashboard = json!({
            "templating": {"list": [{"name": "datasource"}, {"name": "uuid", "type": "query", "query": {"query": "label_values(gpu_a_total, uuid)"}}]},
            "panels": [panel(1, 0), panel(2, 4)],
        });
        if let Some(part) = dashboard.pointer_mut(pointer) {
            *part = value;
        }
        let problems = problems_of_dashboard(&dashboard, &catalogue(), &Rules::parse(GOOD).expect("rules"));
        assert_eq!(problems.is_empty(), expect.is_empty(), "{pointer}: {problems:?}");
        assert!(expect.is_empty() || problems.iter().any(|problem| problem.contains(expect)), "{pointer}: {problems:?}");
    }

    #[test]
    fn defects_of_a_dashboard_are_found() {
        check_dashboard("/none", json!(0), "");
        check_dashboard("/panels/1/id", json!(1), "not unique");
        check_dashboard("/panels/1/gridPos/x", json!(3), "overlaps");
        check_dashboard("/panels/1/gridPos/x", json!(21), "grid");
        check_dashboard("/panels/1/description", json!(""), "description");
        check_dashboard("/panels/1/targets/0/expr", json!("gpu_b_total"), "gpu_b_total");
        check_dashboard("/panels/1/targets/0/expr", json!("gpu_a_total{uuid=~\"$gpu\"}"), "$gpu");
        check_dashboard("/panels/1/targets/0/legendFormat", json!("{{pod}}"), "label pod");
        check_dashboard("/panels/1/datasource/uid", json!("P1"), "data source");
        check_dashboard("/templating/list/1/name", json!("gpu"), "not defined");
        check_dashboard("/templating/list/1/query/query", json!("label_values(gpu_a_total, pod)"), "no such label");
    }
}
