//! A page is whole, loads nothing, and says what the text says.

use super::{escaped, plan_page, replay_page};
use crate::{
    plan::tests::{GIB, planned, rounds},
    plan::{Lending, PlanReport},
    report::tests::report,
};

/// Elements that have no end.
const VOID: [&str; 2] = ["!DOCTYPE", "meta"];

/// Checks that every element ends where it should and every attribute is quoted. Returns the names of all elements.
fn elements(page: &str) -> Result<Vec<String>, String> {
    let mut open: Vec<String> = Vec::new();
    let mut all = Vec::new();
    let mut rest = page;
    while let Some(begin) = rest.find('<') {
        if rest[..begin].contains('>') {
            return Err(format!("a stray > in {:?}", &rest[..begin]));
        }
        let end = rest[begin..]
            .find('>')
            .ok_or("an element that does not end")?
            + begin;
        let tag = &rest[begin + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            if open.pop().as_deref() != Some(name) {
                return Err(format!("</{name}> ends another element"));
            }
            continue;
        }
        let name = tag.split([' ', '/']).next().unwrap_or_default().to_owned();
        if !tag.matches('"').count().is_multiple_of(2) || tag.contains('\'') {
            return Err(format!("<{tag}> has an attribute that is not quoted"));
        }
        if !tag.ends_with('/') && !VOID.contains(&name.as_str()) {
            open.push(name.clone());
        }
        all.push(name);
    }
    match open.is_empty() {
        true => Ok(all),
        false => Err(format!("{open:?} do not end")),
    }
}

fn plan() -> PlanReport {
    planned(&rounds(60, 40, 3), Lending::Elastic, 64 * GIB)
}

#[test]
fn pages_are_whole_and_load_nothing() {
    for page in [plan_page(&plan()), replay_page(&report())] {
        let elements = elements(&page).unwrap();
        for wanted in ["svg", "path", "rect", "table", "figcaption", "style"] {
            assert!(elements.iter().any(|name| name == wanted), "{wanted}");
        }
        for loads in [
            "script", "link", "img", "iframe", "object", "embed", "base", "use", "image",
        ] {
            assert!(!elements.iter().any(|name| name == loads), "{loads}");
        }
        for loads in [
            "http:",
            "https:",
            "//",
            "src=",
            "href",
            "url(",
            "@import",
            "javascript:",
            "NaN",
        ] {
            assert!(!page.contains(loads), "{loads} is in\n{page}");
        }
        assert!(
            page.contains("prefers-color-scheme: dark")
                && page.contains("color-scheme: light dark")
        );
    }
    // The twin: the check finds what is broken.
    for broken in [
        "<p>",
        "<p></q>",
        "<b><i></b></i>",
        "<p class=\"x></p>",
        "a > b<p></p>",
    ] {
        assert!(elements(broken).is_err(), "{broken}");
    }
}

#[test]
fn a_page_has_the_figures_of_the_document() {
    let plan = plan();
    let page = plan_page(&plan);
    for arm in &plan.arms {
        for figure in [
            format!("<th scope=\"row\">{}</th>", escaped(&arm.what)),
            format!("<td>{:.1} %</td>", arm.hit_rate * 100.0),
            format!("<td>{}</td>", crate::report::duration(arm.ttft.p99_ms)),
        ] {
            assert!(page.contains(&figure), "{figure} is not in\n{page}");
        }
    }
    assert!(page.contains(&escaped(&plan.advice)) && page.contains(&escaped(&plan.basis)));
    let report = report();
    let page = replay_page(&report);
    for figure in ["SIMULATED", "25.0 %", "16.7 %", "1.5 GB", "-75 %"] {
        assert!(page.contains(figure), "{figure} is not in\n{page}");
    }
}

#[test]
fn what_others_wrote_is_no_markup() {
    let mut plan = plan();
    let name = "<script>alert('x')</script> & \"quoted\" \u{202e}\u{1b}[2J";
    plan.workload.trace = name.to_owned();
    plan.workload.notes = vec![name.to_owned()];
    let page = plan_page(&plan);
    assert!(!elements(&page).unwrap().iter().any(|name| name == "script"));
    assert!(!page.contains('\u{202e}') && !page.contains('\u{1b}'));
}
