//! Small parts of the page.

use super::super::layout::terminal_safe;

/// Escapes text for an element or a quoted attribute. Characters that change the text direction are shown, as on a terminal.
pub fn html_escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in terminal_safe(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

pub fn swatch(colour: Option<usize>) -> String {
    colour.map(|colour| format!("<i class=\"key c{colour}\"></i>")).unwrap_or_default()
}

/// A bar for a ratio, with a label next to it.
pub fn bar(ratio: f64, colour: Option<usize>, label: &str) -> String {
    let width = if ratio.is_finite() { (ratio * 100.0).clamp(0.0, 100.0) } else { 0.0 };
    let class = colour.map_or_else(|| "busy".to_owned(), |colour| format!("c{colour}"));
    format!(
        "<span class=\"barred\"><svg class=\"bar\" viewBox=\"0 0 100 8\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
         <rect class=\"track\" width=\"100\" height=\"8\"/><rect class=\"{class}\" width=\"{width:.1}\" height=\"8\"/></svg><span>{label}</span></span>"
    )
}
