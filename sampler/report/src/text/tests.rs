use super::super::layout::columns;
use super::super::sample;
use super::*;

const WIDE: TextOptions = TextOptions { width: None, colour: false, unicode: true };
const NARROW: TextOptions = TextOptions { width: Some(60), colour: false, unicode: true };
const ASCII: TextOptions = TextOptions { width: Some(80), colour: false, unicode: false };

#[test]
fn report_texts_match_the_golden_files() {
    insta::assert_snapshot!("wide", text(&sample::report(), &WIDE));
    insta::assert_snapshot!("narrow", text(&sample::report(), &NARROW));
    insta::assert_snapshot!("ascii_damaged", text(&sample::damaged(), &ASCII));
    insta::assert_snapshot!("many_users", text(&sample::big(1, 64, 60), &WIDE));
    insta::assert_snapshot!("hostile", text(&sample::hostile(), &NARROW));
}

#[test]
fn no_line_exceeds_the_requested_width() {
    for report in [sample::report(), sample::damaged(), sample::hostile(), sample::big(2, 64, 600)] {
        for width in [40, 60, 80, 100, 200] {
            for unicode in [true, false] {
                let page = text(&report, &TextOptions { width: Some(width), colour: false, unicode });
                for line in page.lines() {
                    assert!(columns(line) <= width, "{width}: {line}");
                }
            }
        }
    }
}

#[test]
fn no_name_contributes_a_control_sequence() {
    let plain = text(&sample::hostile(), &WIDE);
    assert!(plain.chars().all(|c| c == '\n' || !c.is_control()));
    let coloured = text(&sample::hostile(), &TextOptions { colour: true, ..WIDE });
    assert!(coloured.split('\x1b').skip(1).all(|after| after.starts_with('[') && after.contains('m')));
    assert!(!coloured.contains("\x1b[2J"));
}

#[test]
fn without_unicode_the_page_is_ascii() {
    assert!(text(&sample::report(), &ASCII).is_ascii(), "{}", text(&sample::report(), &ASCII));
}

#[test]
fn no_slowdown_is_claimed() {
    for report in [sample::report(), sample::big(1, 20, 60)] {
        assert!(!text(&report, &WIDE).contains("slowed down"));
    }
}

#[test]
fn an_empty_report_matches_the_golden_file() {
    let empty = Report { gpus: vec![], users: vec![], findings: vec![], timelines: vec![], gaps: vec![], ..sample::report() };
    insta::assert_snapshot!("empty", text(&empty, &WIDE));
}
