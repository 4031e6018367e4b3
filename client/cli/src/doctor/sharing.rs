//! Checks that engines which could share blocks do: what adapters tell apart in a namespace's name.
//!
//! A vLLM engine's namespace is a digest of all that could change a byte of a block, what its block hashes are seeded
//! with, and the worker's ranks: `3f.../seed-none/tp0of1/pp0of1`. Engines of the same digest serve the same model in the
//! same way, and share nothing if their seeds differ.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::v1::NamespaceStatus;

use super::{
    broker::Answers,
    report::{Finding, Report},
};

/// How the part of a namespace begins that says what seeds the hashes.
const SEED: &str = "seed-";
/// As much of a digest tells models apart for people.
const SHOWN: usize = 12;

pub(super) fn examine(answers: Option<&Answers>, report: &mut Report) {
    if let Some(answers) = answers {
        report.add(seeds(&answers.namespaces));
    }
}

/// Tells of engines that would share blocks but for `PYTHONHASHSEED`.
fn seeds(namespaces: &[NamespaceStatus]) -> Finding {
    const CHECK: &str = "sharing";
    // What the dead have left hinders nobody.
    let live = namespaces
        .iter()
        .filter(|space| space.leased_bytes > space.estate_bytes);
    let mut alike: BTreeMap<(&str, String), BTreeSet<&str>> = BTreeMap::new();
    let mut count = 0;
    for space in live {
        count += 1;
        if let Some((seed, rest)) = apart(&space.namespace) {
            alike.entry((&space.tenant, rest)).or_default().insert(seed);
        }
    }
    let differ = alike.into_iter().filter(|(_, seeds)| seeds.len() > 1);
    let differ: Vec<String> = differ
        .map(|((_, rest), seeds)| {
            let seeds: Vec<_> = seeds.into_iter().collect();
            format!("{} ({})", shown(&rest), seeds.join(", "))
        })
        .collect();
    if differ.is_empty() {
        return Finding::ok(CHECK, format!("{count} namespaces have leases"));
    }
    Finding::warn(
        CHECK,
        format!(
            "engines share nothing, because their PYTHONHASHSEED differs: {}",
            differ.join("; ")
        ),
        "start all engines of a model with the same PYTHONHASHSEED, or without any",
    )
}

/// What a namespace says of the seed, and the namespace without that.
fn apart(namespace: &str) -> Option<(&str, String)> {
    let parts: Vec<&str> = namespace.split('/').collect();
    let seed = parts.iter().find_map(|part| part.strip_prefix(SEED))?;
    let rest = parts.iter().filter(|part| !part.starts_with(SEED));
    Some((seed, rest.copied().collect::<Vec<_>>().join("/")))
}

/// A namespace for people: the beginning of its digest, and its ranks.
fn shown(namespace: &str) -> String {
    let (digest, ranks) = namespace.split_once('/').unwrap_or((namespace, ""));
    let digest: String = digest.chars().take(SHOWN).collect();
    format!("{digest}/{ranks}")
}

#[cfg(test)]
mod tests {
    use super::{super::report::Verdict, *};

    fn space(namespace: &str, leased: u64, estate: u64) -> NamespaceStatus {
        NamespaceStatus {
            namespace: namespace.to_owned(),
            tenant: "1000".to_owned(),
            leased_bytes: leased,
            estate_bytes: estate,
            ..NamespaceStatus::default()
        }
    }

    #[test]
    fn engines_that_differ_in_their_seed_alone_are_told_apart() {
        let digest = "3fa9c1d2e4b5".repeat(5);
        let named = |seed: &str| space(&format!("{digest}/seed-{seed}/tp0of1/pp0of1"), 8, 0);
        let two = seeds(&[named("none"), named("42")]);
        assert_eq!(two.verdict, Verdict::Warn);
        assert!(
            two.found.contains("3fa9c1d2e4b5/tp0of1/pp0of1 (42, none)"),
            "{two:?}"
        );
        // The twins: the same seed, another model, another rank, another tenant, what a dead engine has left.
        let mut other = named("42");
        other.tenant = "1001".to_owned();
        let dead = space(&format!("{digest}/seed-42/tp0of1/pp0of1"), 8, 8);
        let ranks = space(&format!("{digest}/seed-42/tp0of2/pp0of1"), 8, 0);
        let model = space("77/seed-42/tp0of1/pp0of1", 8, 0);
        let sglang = space(&format!("{digest}/tp0of1/pp0of1"), 8, 0);
        for beside in [named("none"), other, dead, ranks, model, sglang] {
            let found = seeds(&[named("none"), beside]);
            assert_eq!(found.verdict, Verdict::Ok, "{found:?}");
        }
    }
}
