//! Reads sizes as people write them: `64MiB`, `1.5 GB`, `4096`. Command line and broker take the same; so do engines
//! (`engine-adapter/python/swiftcache/engine/settings.py`).

/// Reads a size in bytes: a number with an optional unit, which is B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB,
/// TiB (powers of 1024, as are K, M, G, T alone). Upper and lower case are the same.
///
/// # Errors
/// For everything else. The text says what is taken.
pub fn size(text: &str) -> Result<u64, String> {
    let refuse = || {
        format!("{text:?} is not a size; takes a number of bytes, or a number with kB, MiB, GB ...")
    };
    let trimmed = text.trim();
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(refuse()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(refuse);
    }
    let number: f64 = number.parse().map_err(|_| refuse())?;
    let bytes = number * factor as f64;
    if bytes.is_finite() && (0.0..u64::MAX as f64).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(refuse())
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("64 mib", 64 << 20),
            ("2g", 2 << 30),
            ("1.5 GB", 1_500_000_000),
            ("0.5TiB", 1 << 39),
            ("12 B", 12),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_and_says_what_it_takes() {
        for text in [
            "",
            "MiB",
            "-1",
            "1.2.3",
            "5 parsecs",
            "99999999999 TiB",
            "1e3",
        ] {
            let error = size(text).unwrap_err();
            assert!(error.contains("MiB") && error.contains(text), "{error}");
        }
    }
}
