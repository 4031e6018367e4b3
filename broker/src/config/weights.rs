//! The settings `namespace_weights` and `tenant_weights`: how much more somebody gets than others when there is not enough
//! for all.

use std::collections::BTreeMap;

use super::Config;
use crate::core::is_uid;

/// The largest weight. With a larger one, the shares of others would be rounded to nothing.
const MOST: u32 = 1_000;

impl Config {
    /// The weights by namespace.
    ///
    /// # Errors
    /// When the setting is not a list of names and weights. The error names the key.
    pub fn namespace_weights(&self) -> Result<BTreeMap<String, u32>, String> {
        read("namespace_weights", self.namespace_weights.as_deref())
    }

    /// The weights by user (`1000`) and by label of a user (`1000/batch`).
    ///
    /// # Errors
    /// When the setting is not a list of tenants and weights. The error names the key.
    pub fn tenant_weights(&self) -> Result<BTreeMap<String, u32>, String> {
        let weights = read("tenant_weights", self.tenant_weights.as_deref())?;
        let no_tenant = weights.keys().find(|tenant| match tenant.split_once('/') {
            Some((uid, label)) => !is_uid(uid) || label.is_empty(),
            None => !is_uid(tenant),
        });
        match no_tenant {
            None => Ok(weights),
            Some(name) => Err(format!(
                "tenant_weights: {name:?} is no tenant; takes a uid, or a uid, a slash and a label"
            )),
        }
    }
}

fn read(key: &str, text: Option<&str>) -> Result<BTreeMap<String, u32>, String> {
    let mut weights = BTreeMap::new();
    for part in text.iter().flat_map(|all| all.split(',')) {
        let problem = |problem: &str| {
            format!(
                "{key}: {part:?} {problem}; takes NAME=WEIGHT, 1 to {MOST}, separated by commas"
            )
        };
        // Split at the last =, because a name may contain =.
        let (name, weight) = part.rsplit_once('=').ok_or_else(|| problem("has no ="))?;
        let weight = weight.trim().parse().ok();
        let weight = weight.filter(|weight| (1..=MOST).contains(weight));
        let weight = weight.ok_or_else(|| problem("has no valid weight"))?;
        let name = name.trim();
        if name.is_empty() {
            return Err(problem("has no name"));
        }
        if weights.insert(name.to_owned(), weight).is_some() {
            return Err(problem("names the same twice"));
        }
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_read_or_refused_by_name() {
        assert_eq!(Config::default().namespace_weights(), Ok(BTreeMap::new()));
        let read = |text: &str| read("namespace_weights", Some(text));
        let read_well = read("qwen3-8b=3, llama=a=1").unwrap();
        assert_eq!(
            read_well,
            BTreeMap::from([("qwen3-8b".to_owned(), 3), ("llama=a".to_owned(), 1)])
        );
        for bad in [
            "",
            "qwen",
            "qwen=0",
            "qwen=1001",
            "qwen=-1",
            "=3",
            "a=1,a=2",
            "a=1,",
        ] {
            let problem = read(bad).unwrap_err();
            assert!(problem.starts_with("namespace_weights: "), "{problem}");
        }
    }

    #[test]
    fn tenants_are_uids_and_their_labels() {
        let read = |text: &str| {
            let config = Config {
                tenant_weights: Some(text.to_owned()),
                ..Config::default()
            };
            config.tenant_weights()
        };
        let read_well = read("1000=3,1000/batch=2").unwrap();
        assert_eq!(
            read_well,
            BTreeMap::from([("1000".to_owned(), 3), ("1000/batch".to_owned(), 2)])
        );
        for bad in [
            "alice=2",
            "1000/=2",
            "/batch=2",
            "-1=2",
            "1000=0",
            "01000=3",
            "+1000=3",
            "01000/batch=3",
        ] {
            let problem = read(bad).unwrap_err();
            assert!(problem.starts_with("tenant_weights: "), "{problem}");
        }
    }
}
