//! Shapes of real models: the numbers that decide the size of their KV cache and the cost of their arithmetic.

/// The shape of a transformer with grouped-query attention, from its published configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelShape {
    /// The model's name in `--model`.
    pub name: &'static str,
    /// The repository whose configuration the numbers are from.
    pub source: &'static str,
    /// All weights, count.
    pub parameters: f64,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
}

/// Bytes of one weight or one KV element: bfloat16.
pub const ELEMENT_BYTES: u64 = 2;

macro_rules! shape {
    ($name:literal, $source:literal, $billions:literal, $layers:literal, $heads:literal, $kv:literal) => {
        ModelShape {
            name: $name,
            source: $source,
            parameters: $billions * 1e9,
            layers: $layers,
            heads: $heads,
            kv_heads: $kv,
            head_dim: 128,
        }
    };
}

/// The models known by name. Numbers: `config.json` of the source's repository (`num_hidden_layers`,
/// `num_attention_heads`, `num_key_value_heads`, `head_dim`), parameters from its weights' index.
pub const MODELS: [ModelShape; 9] = [
    shape!("qwen3-8b", "Qwen/Qwen3-8B", 8.19, 36, 32, 8),
    shape!("qwen3-14b", "Qwen/Qwen3-14B", 14.77, 40, 40, 8),
    shape!("qwen3-32b", "Qwen/Qwen3-32B", 32.76, 64, 64, 8),
    shape!("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8.03, 32, 32, 8),
    shape!(
        "llama-3.1-70b",
        "meta-llama/Llama-3.1-70B",
        70.55,
        80,
        64,
        8
    ),
    shape!("mistral-7b", "mistralai/Mistral-7B-v0.3", 7.25, 32, 32, 8),
    shape!(
        "mistral-small-24b",
        "mistralai/Mistral-Small-24B-Base-2501",
        23.57,
        40,
        32,
        8
    ),
    shape!("llama-2-7b", "meta-llama/Llama-2-7b-hf", 6.74, 32, 32, 32),
    shape!(
        "lwm-7b",
        "LargeWorldModel/LWM-Text-Chat-1M",
        6.74,
        32,
        32,
        32
    ),
];

impl ModelShape {
    /// The model of that name.
    ///
    /// # Errors
    /// When there is no such model. The error lists all names.
    pub fn by_name(name: &str) -> Result<&'static Self, String> {
        let known = || MODELS.map(|model| model.name).join(", ");
        MODELS
            .iter()
            .find(|model| model.name == name)
            .ok_or_else(|| format!("no model {name:?}; takes one of {}", known()))
    }

    /// The part of the model that one of `ranks` GPUs holds under tensor parallelism: a share of heads and weights.
    ///
    /// # Errors
    /// When the heads cannot be divided evenly.
    pub fn shard(&self, ranks: u32) -> Result<Self, String> {
        let divides = |heads: u32| ranks > 0 && heads.is_multiple_of(ranks);
        if !divides(self.heads) || !divides(self.kv_heads) {
            return Err(format!(
                "{} has {} heads and {} KV heads, which {ranks} ranks cannot share evenly",
                self.name, self.heads, self.kv_heads
            ));
        }
        Ok(Self {
            parameters: self.parameters / f64::from(ranks),
            heads: self.heads / ranks,
            kv_heads: self.kv_heads / ranks,
            ..*self
        })
    }

    /// KV bytes of one token in one layer: a key and a value for every KV head.
    pub fn layer_bytes_per_token(&self) -> u64 {
        2 * u64::from(self.kv_heads) * u64::from(self.head_dim) * ELEMENT_BYTES
    }

    /// KV bytes of one token over all layers.
    pub fn bytes_per_token(&self) -> u64 {
        self.layer_bytes_per_token() * self.layers as u64
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        (self.parameters * ELEMENT_BYTES as f64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_bytes_per_token_are_the_known_ones() {
        for (name, kib) in [
            ("qwen3-8b", 144),
            ("qwen3-32b", 256),
            ("llama-3.1-8b", 128),
            ("llama-3.1-70b", 320),
            ("lwm-7b", 512),
        ] {
            let model = ModelShape::by_name(name).unwrap();
            assert_eq!(model.bytes_per_token(), kib << 10, "{name}");
        }
    }

    #[test]
    fn ranks_share_heads_and_weights_evenly_or_not_at_all() {
        let model = ModelShape::by_name("qwen3-32b").unwrap();
        let shard = model.shard(4).unwrap();
        assert_eq!(shard.bytes_per_token() * 4, model.bytes_per_token());
        assert_eq!(shard.weight_bytes(), model.weight_bytes() / 4);
        for ranks in [0, 3, 16] {
            assert!(model.shard(ranks).unwrap_err().contains("8 KV heads"));
        }
    }

    #[test]
    fn an_unknown_model_is_answered_with_the_known_ones() {
        let error = ModelShape::by_name("gpt-9").unwrap_err();
        assert!(
            error.contains("gpt-9") && error.contains("qwen3-8b"),
            "{error}"
        );
    }
}
