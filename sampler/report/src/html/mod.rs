//! The report as one self-contained page: no network, no other file.
//!
//! All statements are in the markup and readable without scripts. A script draws the timelines from compact embedded data; in long
//! sessions, windows are merged. Tenants choose the names of containers, so all strings are escaped, and a content security policy allows
//! only the script and the style of the page, by their digests.

mod contention;
mod data;
mod digest;
mod engines;
mod markup;
mod waits;

use std::collections::HashMap;

use super::model::*;
use super::ranking::{UserUsage, users_of};
use super::wait_words;
use super::words::{self, Names};
pub use markup::html_escape;
use markup::{bar, swatch};
use sampler_core::units::rfc3339;

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");
/// The fill pattern of unobserved time in bars.
const HATCH: &str = "<svg class=\"defs\" aria-hidden=\"true\"><pattern id=\"hatch\" width=\"5\" height=\"5\" \
                     patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\"><line class=\"hatch\" y2=\"5\"/></pattern></svg>";
/// Users of a GPU that are visible initially; the others are collapsed.
const SHOWN: usize = 20;
/// Damaged parts and gaps that are listed; the others are counted.
const PROBLEMS: usize = 50;
/// Number of user colours. Users with the same colour are distinguished by name.
const COLOURS: usize = 10;

/// The page with the state that all of its parts share.
struct HtmlPage<'a> {
    report: &'a Report,
    names: Names,
    /// Colour by user, in the order of the report.
    colours: Vec<usize>,
    /// Position in the report by user id.
    positions: HashMap<&'a str, usize>,
    out: String,
}

pub fn html(report: &Report) -> String {
    let mut page = HtmlPage {
        report,
        names: Names::new(report),
        colours: colours(&report.users),
        positions: report.users.iter().enumerate().map(|(at, user)| (user.id.as_str(), at)).collect(),
        out: String::new(),
    };
    page.head();
    page.problems();
    page.findings();
    page.experiments();
    page.overview();
    for (nth, gpu) in report.gpus.iter().enumerate() {
        page.gpu(nth, gpu);
    }
    if report.gpus.is_empty() {
        page.add("<p class=\"card quiet\">The report has no GPU.</p>");
    }
    page.waiting();
    page.engines();
    page.foot();
    page.out
}

/// The colour of a user depends on its name, so that it is the same on every GPU and usually in every report. If two users would have the
/// same colour, the one with fewer GPU-seconds gets another while there are unused ones.
fn colours(users: &[UserReport]) -> Vec<usize> {
    let mut taken = [0_usize; COLOURS];
    let colour = |user: &UserReport| {
        let hash = user
            .display_name()
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let first = (hash >> 32) as usize % COLOURS;
        let least = taken.iter().copied().min().unwrap_or(0);
        let own = (0..COLOURS).map(|step| (first + step) % COLOURS).find(|at| taken[*at] == least).unwrap_or(first);
        taken[own] += 1;
        own
    };
    users.iter().map(colour).collect()
}

impl HtmlPage<'_> {
    fn add(&mut self, markup: &str) {
        self.out.push_str(markup);
        self.out.push('\n');
    }

    fn user(&self, id: &str) -> String {
        format!("{}<bdi>{}</bdi>", swatch(self.colour_of(id)), html_escape(&self.names.get(id)))
    }

    fn colour_of(&self, id: &str) -> Option<usize> {
        self.positions.get(id).and_then(|at| self.colours.get(*at)).copied()
    }

    fn head(&mut self) {
        let report = self.report;
        let node = html_escape(&words::node(&report.node));
        let policy = format!(
            "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
            digest::sha256_base64(SCRIPT.as_bytes()),
            digest::sha256_base64(STYLE.as_bytes())
        );
        self.add(&format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"referrer\" content=\"no-referrer\">\n<title>GPU session on {node}, {}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<a class=\"skip\" href=\"#findings\">Skip to the findings</a>\n{HATCH}\n<header class=\"top\">",
            words::date(report.start)
        ));
        self.add(&format!("<p class=\"kicker\">GPU session</p><h1><bdi>{node}</bdi></h1>"));
        let end = words::after(report.start, report.duration_seconds);
        self.add(&format!(
            "<p class=\"when\"><time datetime=\"{}\">{}</time> to {}, {}</p>",
            rfc3339(report.start),
            words::date(report.start),
            words::clock(end),
            words::span(report.duration_seconds)
        ));
        self.tiles();
        self.add("</header>\n<main>");
    }

    fn tiles(&mut self) {
        let gpus = &self.report.gpus;
        let sum = |seconds: fn(&GpuReport) -> f64| gpus.iter().map(seconds).sum::<f64>();
        let (busy, idle, unobserved) =
            (sum(|gpu| gpu.busy_seconds), sum(|gpu| gpu.idle_seconds), sum(|gpu| gpu.unobserved_seconds));
        let whole = busy + idle + unobserved + sum(|gpu| gpu.unsupported_seconds);
        let contended: f64 = self.report.users.iter().flat_map(|user| &user.gpus).map(|usage| usage.contended_seconds).sum();
        let tile = |name: &str, value: &str, note: &str, class: &str| {
            format!("<div class=\"tile {class}\"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>")
        };
        let unseen_class = if unobserved > 0.0 { "bad" } else { "" };
        let all = [
            tile("GPUs", &words::count(gpus.len()), "", ""),
            tile("Users", &words::count(self.report.users.len()), "", ""),
            tile("Busy", &words::part(busy, whole), &format!("{} GPU-seconds", words::number(busy)), ""),
            tile("Not observed", &words::part(unobserved, whole), &words::span(unobserved), unseen_class),
            tile("Contended", &words::span(contended), "summed over users", ""),
        ];
        self.add(&format!("<dl class=\"tiles\">{}</dl>", all.concat()));
    }

    /// Before everything else, because all numbers refer to the remaining data only.
    fn problems(&mut self) {
        let report = self.report;
        let list = |all: Vec<String>, n: usize| {
            let more = if n > PROBLEMS { format!("<li>… {} more</li>", words::count(n - PROBLEMS)) } else { String::new() };
            format!("<ul>{}{more}</ul>", all.concat())
        };
        if report.truncated || !report.damage.is_empty() {
            let (title, text) = if report.damage.is_empty() {
                ("Incomplete", "The file ends before the session did. The report covers what was recorded until then.")
            } else {
                ("Damaged", "Parts of the file cannot be read. The report covers the readable parts.")
            };
            let all = report.damage.iter().take(PROBLEMS).map(|damage| format!("<li>{}</li>", html_escape(damage))).collect();
            self.add(&format!(
                "<aside class=\"alarm\" role=\"note\"><h2>{title}</h2><p>{text}</p>{}</aside>",
                list(all, report.damage.len())
            ));
        }
        if !report.gaps.is_empty() {
            let lost: f64 = report.gaps.iter().map(|gap| (gap.to.seconds() - gap.from.seconds()).max(0.0)).sum();
            let item = |gap: &Gap| {
                let (from, to) = (words::clock_millis(gap.from), words::clock_millis(gap.to));
                format!(
                    "<li><b>{}</b> {from} to {to}: {}</li>",
                    words::gpu_name(self.report, &gap.uuid),
                    html_escape(&gap.reason)
                )
            };
            let all = report.gaps.iter().take(PROBLEMS).map(item).collect();
            let title = words::counted(report.gaps.len(), "gap", "gaps");
            let markup = format!(
                "<aside class=\"alarm gaps\" role=\"note\"><h2>{title}</h2><p>{} not observed: hatched in the timelines and not \
                 counted as idle.</p>{}</aside>",
                words::span(lost),
                list(all, report.gaps.len())
            );
            self.add(&markup);
        }
    }

    /// A table of all GPUs, with links.
    fn overview(&mut self) {
        if self.report.gpus.len() < 2 {
            return;
        }
        self.add("<section class=\"card\"><h2>GPUs</h2><div class=\"scroll\"><table class=\"numbers\"><thead><tr><th scope=\"col\">GPU</th>");
        self.add("<th scope=\"col\">Model</th><th scope=\"col\" class=\"wide\">Busy</th><th scope=\"col\">Saturated</th>");
        self.add("<th scope=\"col\">Not observed</th><th scope=\"col\">Memory max</th><th scope=\"col\">Users</th></tr></thead><tbody>");
        for (nth, gpu) in self.report.gpus.iter().enumerate() {
            let whole = gpu.busy_seconds + gpu.idle_seconds + gpu.unobserved_seconds + gpu.unsupported_seconds;
            let unobserved =
                if gpu.unobserved_seconds > 0.0 { words::seconds(gpu.unobserved_seconds) } else { "none".to_owned() };
            let row = format!(
                "<tr><th scope=\"row\"><a href=\"#gpu-{nth}\">{}</a></th><td class=\"text\">{}</td><td class=\"wide\">{}</td>\
                 <td>{}</td><td>{unobserved}</td><td>{}</td><td>{}</td></tr>",
                words::gpu_name(self.report, &gpu.uuid),
                html_escape(&gpu.model),
                bar(gpu.busy_seconds / whole, None, &words::part(gpu.busy_seconds, whole)),
                words::part(gpu.saturated_seconds, whole),
                words::maybe_bytes(gpu.memory_used_max_bytes),
                users_of(self.report, &gpu.uuid).len()
            );
            self.add(&row);
        }
        self.add("</tbody></table></div></section>");
    }

    fn gpu(&mut self, nth: usize, gpu: &GpuReport) {
        let users = users_of(self.report, &gpu.uuid);
        let parent = gpu.gpu_uuid.as_deref().map(|uuid| format!(" of {}", html_escape(uuid))).unwrap_or_default();
        let head = format!(
            "<section class=\"card gpu\" id=\"gpu-{nth}\"><h2>{} <small>{} <span class=\"uuid\">{}{parent}</span></small></h2>",
            words::gpu_name(self.report, &gpu.uuid),
            html_escape(&gpu.model),
            html_escape(&gpu.uuid)
        );
        self.add(&head);
        self.states(gpu);
        if let Some(at) = self.report.timelines.iter().position(|timeline| timeline.uuid == gpu.uuid) {
            self.add(&format!("<div class=\"chart\" data-timeline=\"{at}\"></div>"));
            self.add("<noscript><p class=\"note\">The timeline requires JavaScript; the tables below do not.</p></noscript>");
            self.marks(&self.report.timelines[at]);
        }
        if users.is_empty() {
            self.add("<p class=\"note\">No users.</p>");
        } else {
            self.usages(&users);
            self.matrix(gpu, &users);
            self.waiting_matrix(&users);
            self.victims(&users);
        }
        self.add("</section>");
    }

    fn states(&mut self, gpu: &GpuReport) {
        let whole = gpu.busy_seconds + gpu.idle_seconds + gpu.unobserved_seconds + gpu.unsupported_seconds;
        let (mut bar, mut legend, mut from) = (String::new(), String::new(), 0.0);
        let states = [
            ("busy", "busy", gpu.busy_seconds),
            ("idle", "idle", gpu.idle_seconds),
            ("unseen", "not observed", gpu.unobserved_seconds),
            ("unsupported", "not supported", gpu.unsupported_seconds),
        ];
        for (class, name, value) in states.into_iter().filter(|(_, _, value)| *value > 0.0) {
            let width = value / whole * 1000.0;
            bar += &format!("<rect class=\"{class}\" x=\"{from:.1}\" width=\"{width:.1}\" height=\"10\"/>");
            from += width;
            let (seconds, part) = (words::seconds(value), words::part(value, whole));
            legend += &format!("<li><i class=\"key {class}\"></i>{name} <b>{seconds}</b> {part}</li>");
        }
        legend += &format!("<li>saturated <b>{}</b></li>", words::seconds(gpu.saturated_seconds));
        if let Some(used) = gpu.memory_used_max_bytes {
            let total = gpu.memory_total_bytes.map(|total| format!(" of {}", words::bytes(total))).unwrap_or_default();
            legend += &format!("<li>memory up to <b>{}</b>{total}</li>", words::bytes(used));
        }
        for limit in gpu.throttle_seconds.iter().flatten().filter(|limit| limit.value > 0.0) {
            legend += &format!("<li>clocks limited by {} <b>{}</b></li>", html_escape(&limit.name), words::seconds(limit.value));
        }
        for reason in gpu.unattributed.iter().filter(|reason| reason.value > 0.0) {
            legend += &format!("<li>unattributed ({}) <b>{}</b></li>", html_escape(&reason.name), words::seconds(reason.value));
        }
        for xid in &gpu.xids {
            legend += &format!(
                "<li class=\"bad\">XID {} <b>{} times</b></li>",
                html_escape(&xid.name),
                words::count(xid.value as usize)
            );
        }
        self.add(&format!(
            "<svg class=\"states\" viewBox=\"0 0 1000 10\" preserveAspectRatio=\"none\" aria-hidden=\"true\">{bar}</svg>\
             <ul class=\"legend\">{legend}</ul>"
        ));
    }

    fn marks(&mut self, timeline: &Timeline) {
        if timeline.marks.is_empty() {
            return;
        }
        let item = |(offset, mark): &(f64, String)| {
            format!("<li><time>{}</time> {}</li>", words::clock(words::after(self.report.start, *offset)), html_escape(mark))
        };
        let all: String = timeline.marks.iter().take(PROBLEMS).map(item).collect();
        self.add(&format!("<ul class=\"marks\">{all}</ul>"));
    }

    fn usages(&mut self, users: &[UserUsage<'_>]) {
        self.add("<h3>Users</h3>");
        let (shown, rest) = users.split_at(users.len().min(SHOWN));
        let table = self.usage_table(shown);
        self.add(&table);
        if !rest.is_empty() {
            let sum = words::number(rest.iter().map(|(_, usage)| usage.gpu_seconds).sum());
            let table = self.usage_table(rest);
            self.add(&format!(
                "<details><summary>{} more: {sum} GPU-seconds</summary>{table}</details>",
                words::count(rest.len())
            ));
        }
    }

    fn usage_table(&self, users: &[UserUsage<'_>]) -> String {
        let heads = ["User", "GPU-seconds", "Share of busy", "Active", "Coactive", "Contended", "Memory max"];
        let heads: String = heads
            .iter()
            .enumerate()
            .map(|(at, head)| format!("<th scope=\"col\"{}>{head}</th>", if at == 2 { " class=\"wide\"" } else { "" }))
            .collect();
        let mut out = format!("<div class=\"scroll\"><table class=\"numbers\"><thead><tr>{heads}</tr></thead><tbody>\n");
        for (user, usage) in users {
            let image =
                if user.image.is_empty() { String::new() } else { format!("<small>{}</small>", html_escape(&user.image)) };
            let share = words::percent_with_error(usage.share_of_busy, usage.share_stderr);
            let share = bar(usage.share_of_busy.unwrap_or(0.0), self.colour_of(&user.id), &share);
            out += &format!(
                "<tr><th scope=\"row\">{}{image}</th><td>{}</td><td class=\"wide\">{share}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
                self.user(&user.id),
                words::with_error(usage.gpu_seconds, usage.gpu_seconds_stderr),
                words::seconds(usage.active_seconds),
                words::seconds(usage.coactive_seconds),
                words::seconds(usage.contended_seconds),
                words::maybe_bytes(usage.memory_max_bytes),
            );
        }
        out + "</tbody></table></div>"
    }

    fn foot(&mut self) {
        let report = self.report;
        let (window, saturated) = (words::seconds(report.window_seconds), words::percent(report.saturation_ratio));
        let grade =
            |evidence: Evidence| format!("<dt>{}</dt><dd>{}.</dd>", evidence.name(), words::sentence(words::meaning(evidence)));
        let grades: String = words::explained_grades(report).into_iter().map(grade).collect();
        let (waited, covered) = if wait_words::has_waits(report) {
            (format!("<dt>Waited</dt><dd>{}.</dd>", words::sentence(wait_words::LANE)), "GPU time and waiting in blocking calls")
        } else {
            (String::new(), "GPU time")
        };
        self.add(&format!(
            "</main>\n<footer><dl>\
             <dt>GPU-seconds</dt><dd>Time for which a user kept the engines of the GPU busy. The error is one standard error, of \
             sampling only.</dd>\
             <dt>Active, coactive, contended</dt><dd>Seconds of windows of {window} in which a user had a sample (active), in which \
             another user had one as well (coactive), and in which the GPU was also saturated, that is, at least {saturated} busy (contended).</dd>\
             {grades}{waited}\
             <dt>Not measured</dt><dd>The progress of workloads. The report covers {covered} only.</dd></dl>\
             <p>gpu-sampler {}</p></footer>",
            html_escape(&report.agent_version)
        ));
        let data = data::embedded(report, &self.names, &self.colours);
        self.add(&format!(
            "<script type=\"application/json\" id=\"data\">{data}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>"
        ));
    }
}

#[cfg(test)]
mod tests;
