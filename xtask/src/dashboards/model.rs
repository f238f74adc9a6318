//! The parts of a Grafana dashboard that these dashboards use, and their JSON (schema version 39: Grafana 11.0; later versions migrate it
//! when they load it).

use crate::dashboards::catalogue::Catalogue;
use serde_json::{Value, json};

/// Grafana's grid has 24 columns.
const COLUMNS: u32 = 24;
const SCHEMA_VERSION: u32 = 39;
/// All dashboards link to each other by this tag.
const TAG: &str = "gpu-sampler";

#[derive(Clone, Copy)]
pub enum Kind {
    Stat,
    TimeSeries,
    /// Areas on top of each other: parts of a whole.
    Stacked,
    Table,
}

/// Colours from these values on, above the base colour.
#[derive(Clone, Copy)]
pub enum Thresholds {
    None,
    /// Larger is worse: yellow and red from these values on.
    High(f64, f64),
    /// Anything above 0 is a problem.
    AboveZero,
}

pub struct Panel {
    kind: Kind,
    title: &'static str,
    description: &'static str,
    unit: &'static str,
    width: u32,
    height: u32,
    /// Expression and legend.
    queries: Vec<(String, &'static str)>,
    thresholds: Thresholds,
    max: Option<f64>,
    /// Rows of a table link to the dashboard of the user.
    links_to_user: bool,
}

impl Panel {
    fn new(kind: Kind, (width, height): (u32, u32), title: &'static str, unit: &'static str, description: &'static str) -> Self {
        let (queries, thresholds, max) = (Vec::new(), Thresholds::None, None);
        Self { kind, title, description, unit, width, height, queries, thresholds, max, links_to_user: false }
    }

    pub fn stat(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Kind::Stat, (4, 4), title, unit, description)
    }

    pub fn series(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Kind::TimeSeries, (12, 8), title, unit, description)
    }

    pub fn stacked(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Kind::Stacked, (12, 8), title, unit, description)
    }

    pub fn table(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Kind::Table, (12, 8), title, unit, description)
    }

    pub fn width(mut self, width: u32) -> Self {
        self.width = width;
        self
    }

    pub fn query(mut self, expr: impl Into<String>, legend: &'static str) -> Self {
        self.queries.push((expr.into(), legend));
        self
    }

    pub fn thresholds(mut self, thresholds: Thresholds) -> Self {
        self.thresholds = thresholds;
        self
    }

    /// A ratio from 0 to 1.
    pub fn ratio(mut self) -> Self {
        self.max = Some(1.0);
        self
    }

    pub fn links_to_user(mut self) -> Self {
        self.links_to_user = true;
        self
    }

    fn type_name(&self) -> &'static str {
        match self.kind {
            Kind::Stat => "stat",
            Kind::TimeSeries | Kind::Stacked => "timeseries",
            Kind::Table => "table",
        }
    }

    /// With the collectors that `/metrics` does not have by default.
    fn full_description(&self, catalogue: &Catalogue) -> String {
        let mut text = self.description.to_owned();
        let mut needed: Vec<&str> = Vec::new();
        for (expr, _) in &self.queries {
            needed.extend(catalogue.optional_collectors(expr));
        }
        needed.sort_unstable();
        needed.dedup();
        for collector in needed {
            text.push_str(&format!(" Needs the collector {collector}: collect[]={collector}."));
        }
        text
    }

    fn options(&self) -> Value {
        match self.kind {
            Kind::Stat => json!({
                "colorMode": if matches!(self.thresholds, Thresholds::None) { "none" } else { "value" },
                "graphMode": "area",
                "justifyMode": "auto",
                "orientation": "auto",
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": false},
                "textMode": "auto",
                "wideLayout": true,
            }),
            Kind::TimeSeries | Kind::Stacked => json!({
                "legend": {"calcs": ["mean", "max"], "displayMode": "table", "placement": "bottom", "showLegend": true},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }),
            Kind::Table => json!({
                "cellHeight": "sm",
                "footer": {"countRows": false, "fields": "", "reducer": ["sum"], "show": false},
                "showHeader": true,
                "sortBy": [{"desc": true, "displayName": "Value"}],
            }),
        }
    }

    fn defaults(&self) -> Value {
        let step = |colour: &str, value: Option<f64>| json!({"color": colour, "value": value});
        let steps = match self.thresholds {
            Thresholds::None => vec![step("green", None)],
            Thresholds::High(yellow, red) => vec![step("green", None), step("yellow", Some(yellow)), step("red", Some(red))],
            Thresholds::AboveZero => vec![step("green", None), step("red", Some(0.001))],
        };
        let custom = match self.kind {
            Kind::Stat => json!({}),
            Kind::Table => json!({"align": "auto", "cellOptions": {"type": "auto"}, "inspect": false}),
            Kind::TimeSeries => json!({
                "drawStyle": "line", "fillOpacity": 0, "lineWidth": 1, "showPoints": "never", "spanNulls": false,
                "stacking": {"group": "A", "mode": "none"},
            }),
            Kind::Stacked => json!({
                "drawStyle": "line", "fillOpacity": 60, "lineWidth": 0, "showPoints": "never", "spanNulls": false,
                "stacking": {"group": "A", "mode": "normal"},
            }),
        };
        let mut defaults = json!({
            "color": {"mode": if matches!(self.kind, Kind::Stat) { "thresholds" } else { "palette-classic" }},
            "custom": custom,
            "mappings": [],
            "min": 0,
            "thresholds": {"mode": "absolute", "steps": steps},
            "unit": self.unit,
        });
        if let Some(max) = self.max {
            defaults["max"] = json!(max);
        }
        if self.links_to_user {
            let labels =
                ["namespace", "pod", "container"].map(|label| format!("var-{label}=${{__data.fields.{label}}}")).join("&");
            let url = format!("/d/gpu-sampler-user?${{datasource:queryparam}}&{labels}&${{__url_time_range}}");
            defaults["links"] = json!([{"title": "Container", "url": url, "targetBlank": false}]);
        }
        defaults
    }

    fn json(&self, id: u32, at: (u32, u32), catalogue: &Catalogue) -> Value {
        let is_table = matches!(self.kind, Kind::Table);
        let target = |(n, (expr, legend)): (usize, &(String, &str))| {
            json!({
                "datasource": datasource(),
                "editorMode": "code",
                "expr": expr,
                "format": if is_table { "table" } else { "time_series" },
                "instant": is_table,
                "legendFormat": legend,
                "range": !is_table,
                "refId": char::from(b'A' + n as u8).to_string(),
            })
        };
        let targets: Vec<Value> = self.queries.iter().enumerate().map(target).collect();
        // The time of an instant query is that of the dashboard; the type of a table's column is in its unit.
        let transformations = if is_table {
            json!([{"id": "organize", "options": {"excludeByName": {"Time": true, "__name__": true, "job": true}}}])
        } else {
            json!([])
        };
        json!({
            "datasource": datasource(),
            "description": self.full_description(catalogue),
            "fieldConfig": {"defaults": self.defaults(), "overrides": []},
            "gridPos": {"h": self.height, "w": self.width, "x": at.0, "y": at.1},
            "id": id,
            "options": self.options(),
            "targets": targets,
            "title": self.title,
            "transformations": transformations,
            "type": self.type_name(),
        })
    }
}

pub struct PanelGroup {
    pub title: &'static str,
    pub panels: Vec<Panel>,
}

pub struct Dashboard {
    /// Name of the file, and with a prefix the uid.
    pub name: &'static str,
    pub title: &'static str,
    pub description: &'static str,
    /// Names of variables, each with the query of its values.
    pub variables: Vec<(&'static str, &'static str)>,
    pub rows: Vec<PanelGroup>,
}

fn datasource() -> Value {
    json!({"type": "prometheus", "uid": "${datasource}"})
}

/// Any value, also the empty one of a series without the label.
fn variable((name, query): &(&str, &str)) -> Value {
    json!({
        "allValue": ".*",
        "current": {"selected": true, "text": ["All"], "value": ["$__all"]},
        "datasource": datasource(),
        "hide": 0,
        "includeAll": true,
        "multi": true,
        "name": name,
        "options": [],
        "query": {"query": query, "refId": "values"},
        "refresh": 2,
        "regex": "",
        "skipUrlSync": false,
        "sort": 1,
        "type": "query",
    })
}

impl Dashboard {
    pub fn json(&self, catalogue: &Catalogue) -> Value {
        let mut list = vec![json!({
            "hide": 0, "includeAll": false, "multi": false, "name": "datasource", "label": "Data source", "options": [],
            "query": "prometheus", "refresh": 1, "regex": "", "skipUrlSync": false, "type": "datasource",
        })];
        list.extend(self.variables.iter().map(variable));
        json!({
            "annotations": {"list": []},
            "description": self.description,
            "editable": true,
            "fiscalYearStartMonth": 0,
            "graphTooltip": 1,
            "links": [{
                "asDropdown": true, "icon": "external link", "includeVars": true, "keepTime": true, "tags": [TAG],
                "targetBlank": false, "title": "GPU dashboards", "tooltip": "", "type": "dashboards", "url": "",
            }],
            "panels": self.panels(catalogue),
            "refresh": "30s",
            "schemaVersion": SCHEMA_VERSION,
            "tags": [TAG],
            "templating": {"list": list},
            "time": {"from": "now-3h", "to": "now"},
            "timepicker": {},
            "timezone": "",
            "title": self.title,
            "uid": format!("gpu-sampler-{}", self.name),
            "version": 1,
            "weekStart": "",
        })
    }

    /// From left to right, and below when a line of the grid is full.
    fn panels(&self, catalogue: &Catalogue) -> Vec<Value> {
        let (mut panels, mut y) = (Vec::new(), 0);
        for row in &self.rows {
            let id = panels.len() as u32 + 1;
            panels.push(json!({
                "collapsed": false, "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}, "id": id, "panels": [], "title": row.title,
                "type": "row",
            }));
            y += 1;
            let (mut x, mut height) = (0, 0);
            for panel in &row.panels {
                if x + panel.width > COLUMNS {
                    (x, y, height) = (0, y + height, 0);
                }
                panels.push(panel.json(panels.len() as u32 + 1, (x, y), catalogue));
                (x, height) = (x + panel.width, height.max(panel.height));
            }
            y += height;
        }
        panels
    }
}
