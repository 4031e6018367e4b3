//! The setting `namespace_weights`: how much more a namespace gets than others when there is not enough for all.

use std::collections::BTreeMap;

use super::Config;

/// The largest weight. With a larger one, the shares of other namespaces would be rounded to nothing.
const MOST: u32 = 1_000;

impl Config {
    /// The weights by namespace.
    ///
    /// # Errors
    /// When the setting is not a list of names and weights. The error names the key.
    pub fn weights(&self) -> Result<BTreeMap<String, u32>, String> {
        let mut weights = BTreeMap::new();
        for part in self.namespace_weights.iter().flat_map(|all| all.split(',')) {
            let problem = |problem: &str| {
                format!(
                    "namespace_weights: {part:?} {problem}; takes NAME=WEIGHT, 1 to {MOST}, separated by commas"
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
                return Err(problem("names a namespace twice"));
            }
        }
        Ok(weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<BTreeMap<String, u32>, String> {
        let config = Config {
            namespace_weights: Some(text.to_owned()),
            ..Config::default()
        };
        config.weights()
    }

    #[test]
    fn weights_are_read_or_refused_by_name() {
        assert_eq!(Config::default().weights().unwrap(), BTreeMap::new());
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
}
