//! What this process has mapped, as the kernel tells.

/// Whether all of a range is mapped, for reading and writing; or what is not.
pub(super) fn check(address: u64, bytes: u64) -> Result<(), String> {
    let maps = std::fs::read_to_string("/proc/self/maps")
        .map_err(|error| format!("cannot read /proc/self/maps: {error}"))?;
    check_in(&maps, address, bytes)
}

fn check_in(maps: &str, address: u64, bytes: u64) -> Result<(), String> {
    let end = (address.checked_add(bytes))
        .filter(|end| *end > address)
        .ok_or("it is empty or wraps around")?;
    // Mappings are listed in ascending order; a range may span several.
    let mut reached = address;
    for line in maps.lines() {
        let Some((first, last, writable)) = parse(line) else {
            continue;
        };
        if last <= reached {
            continue;
        }
        if first > reached || !writable {
            break;
        }
        reached = last;
        if reached >= end {
            return Ok(());
        }
    }
    Err(format!(
        "only {} of its {bytes} bytes are mapped for reading and writing in this process",
        reached - address
    ))
}

/// `7f0000000000-7f0000001000 rw-p ...`: where it starts and ends, and whether it may be read and written.
fn parse(line: &str) -> Option<(u64, u64, bool)> {
    let (range, rest) = line.split_once(' ')?;
    let (first, last) = range.split_once('-')?;
    let first = u64::from_str_radix(first, 16).ok()?;
    let last = u64::from_str_radix(last, 16).ok()?;
    Some((first, last, rest.starts_with("rw")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-2000 r--p 00000000 08:01 42   /lib/libc.so.6
2000-4000 rw-p 00000000 00:00 0
4000-6000 rw-s 00000000 00:01 7    /memfd:pool (deleted)
6000-7000 r-xp 00000000 08:01 42   /lib/libc.so.6
9000-a000 rw-p 00000000 00:00 0    [heap]
";

    #[test]
    fn a_range_may_span_mappings_but_no_gap() {
        assert_eq!(check_in(MAPS, 0x2000, 0x4000), Ok(()));
        assert_eq!(check_in(MAPS, 0x3ff0, 0x20), Ok(()));
        assert_eq!(check_in(MAPS, 0x9fff, 1), Ok(()));
        for (address, bytes) in [
            (0x1fff, 2),       // read only
            (0x5fff, 2),       // into code
            (0x7000, 1),       // into nothing
            (0x9000, 0x1001),  // past the last
            (0, 8),            // null
            (0x2000, 0),       // empty
            (u64::MAX - 3, 8), // around
        ] {
            assert!(check_in(MAPS, address, bytes).is_err(), "{address:x}");
        }
        let refused = check_in(MAPS, 0x5ff0, 0x20).unwrap_err();
        assert!(refused.contains("only 16 of its 32"), "{refused}");
    }

    #[test]
    fn this_process_own_memory_is_mapped() {
        let bytes = vec![0_u8; 1 << 20];
        assert_eq!(check(bytes.as_ptr() as u64, 1 << 20), Ok(()));
        assert!(check(check as *const () as u64, 1).is_err());
    }
}
