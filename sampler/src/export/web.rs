//! The web page at `/`: three files without a build step that request nothing beyond this agent.
//!
//! The files hold no data, so they are served without a token. Beyond loopback the page prompts for the token and sends it with each
//! request. Where the request itself is authorized (on loopback, or with the token), the page also contains the data as tables, for
//! browsers that do not run scripts.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;

use super::guard::IsAuthorized;
use super::html_tables;
use super::state::AppState;

const INDEX: &str = include_str!("web/index.html");
const SCRIPT: &str = include_str!("web/app.js");
const STYLE: &str = include_str!("web/style.css");
/// Placeholder of the tables.
const TABLES: &str = "<!--tables-->";

/// Tenants choose names, images and cgroups. Even if one of them became markup, it could not run, load or send anything.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const FILES: [&str; 3] = ["/", "/app.js", "/style.css"];

pub fn is_file(path: &str) -> bool {
    FILES.contains(&path)
}

fn file(kind: &'static str, text: impl Into<String>) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // After an upgrade the page of the previous agent must not show data of the new one.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text.into())
}

pub async fn index(
    State(state): State<Arc<AppState>>,
    Extension(IsAuthorized(is_authorized)): Extension<IsAuthorized>,
) -> impl IntoResponse {
    let tables = if is_authorized {
        html_tables::tables(&state.view().0, &state.health.view())
    } else {
        "<p>Without scripts this page shows data only if the request has <code>Authorization: Bearer TOKEN</code>.</p>".to_owned()
    };
    file("text/html; charset=utf-8", INDEX.replacen(TABLES, &tables, 1))
}

pub async fn script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", SCRIPT)
}

pub async fn style() -> impl IntoResponse {
    file("text/css; charset=utf-8", STYLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inline styles and scripts would silently have no effect, because the policy forbids them.
    #[test]
    fn the_page_has_a_placeholder_for_tables_and_nothing_inline() {
        assert_eq!(INDEX.matches(TABLES).count(), 1);
        for inline in ["<style", " style=", "javascript:", " onclick", "http://", "https://"] {
            assert!(!INDEX.contains(inline), "{inline}");
        }
        assert_eq!(INDEX.matches("<script").count(), INDEX.matches("<script src=").count());
        for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!SCRIPT.contains(sink), "{sink}");
        }
    }
}
