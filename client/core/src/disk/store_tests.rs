use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

use parking_lot::Mutex;
use proptest::prelude::*;
use swiftcache_proto::domain::BlockHash;

use super::{
    file::FILE,
    format::{self, PAGE},
    store::{DiskStore, Put, StoreConfig},
};

const LAYERS: [u64; 2] = [5_000, 3_000];

pub(super) fn config(dir: &Path, bytes: u64) -> StoreConfig {
    StoreConfig {
        path: dir.to_owned(),
        bytes,
        tenant: "1000".to_owned(),
        direct: true,
    }
}

pub(super) fn hash(n: u32) -> BlockHash {
    let mut bytes = [7; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
}

/// The bytes of a block: other ones in each namespace.
fn bytes(namespace: &str, n: u32) -> Vec<u8> {
    let mut word = u64::from(n) * 31 + namespace.len() as u64 + 1;
    let mut bytes = Vec::new();
    while bytes.len() < 8_000 {
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (word >> 31);
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

pub(super) fn put(store: &DiskStore, namespace: &str, n: u32) -> Put {
    store.put(namespace, &LAYERS, hash(n), None, &bytes(namespace, n))
}

/// Whether a block is there. Its bytes must be right if it is.
fn has(store: &DiskStore, namespace: &str, n: u32) -> bool {
    let read = store.get(namespace, &hash(n));
    if let Some(read) = &read {
        assert!(
            *read == bytes(namespace, n),
            "wrong bytes of {namespace} {n}"
        );
    }
    read.is_some()
}

/// Two extents.
pub(super) const SMALL: u64 = PAGE + 2 * (128 << 10);

#[test]
fn what_is_kept_comes_back_also_after_a_restart_and_only_under_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskStore::open(&config(dir.path(), 1 << 20)).unwrap();
    for n in 0..10 {
        assert_eq!(put(&store, "a", n), Put::Stored);
        assert_eq!(put(&store, "a", n), Put::Known);
    }
    assert_eq!(put(&store, "bb", 3), Put::Stored);
    let news = store.news();
    assert_eq!(news["a"].stored.len(), 10);
    assert!(store.news().is_empty());
    // Another process has no part in it.
    let second = DiskStore::open(&config(dir.path(), 1 << 20)).unwrap_err();
    assert!(second.to_string().contains("in use"), "{second}");
    drop(store);
    let store = DiskStore::open(&config(dir.path(), 1 << 20)).unwrap();
    assert!((0..10).all(|n| has(&store, "a", n)));
    assert!(has(&store, "bb", 3) && !has(&store, "bb", 4) && !has(&store, "c", 3));
    assert_eq!(store.layers("bb").as_deref(), Some(&LAYERS[..]));
    // Blocks of another shape under the same name are none of these.
    let other = store.put("a", &[8_000], hash(99), None, &bytes("a", 99));
    assert_eq!(other, Put::Refused);
}

#[test]
fn a_full_file_drops_what_is_worth_least_and_never_outgrows_its_bound() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskStore::open(&config(dir.path(), SMALL)).unwrap();
    for n in 0..100 {
        assert_eq!(put(&store, "a", n), Put::Stored);
        // One that is found again and again stays.
        assert!(has(&store, "a", 0));
    }
    let stats = store.stats();
    assert!(stats.evicted_blocks > 50 && stats.blocks > 10, "{stats:?}");
    let file = fs::metadata(dir.path().join(FILE)).unwrap();
    assert!(file.len() <= SMALL && stats.used_bytes <= SMALL);
    let all: BTreeSet<BlockHash> = store.all().into_iter().flat_map(|it| it.1).collect();
    assert!(all.contains(&hash(0)) && all.contains(&hash(99)) && !all.contains(&hash(5)));
    drop(store);
    // A smaller bound keeps what fits.
    let store = DiskStore::open(&config(dir.path(), PAGE + (128 << 10))).unwrap();
    let kept = store.stats().blocks;
    assert!(kept > 0 && kept < stats.blocks);
    assert!(fs::metadata(dir.path().join(FILE)).unwrap().len() <= PAGE + (128 << 10));
}

#[test]
fn a_model_that_comes_finds_room_beside_one_that_has_it_all() {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskStore::open(&config(dir.path(), PAGE + 4 * (128 << 10))).unwrap();
    for n in 0..200 {
        put(&store, "a", n);
    }
    for n in 0..8 {
        assert_eq!(put(&store, "bb", n), Put::Stored);
    }
    assert!((0..8).all(|n| has(&store, "bb", n)));
    assert!(has(&store, "a", 199));
}

/// Where the bytes of a block lie in the file.
fn find(file: &[u8], block: &[u8]) -> usize {
    let at = file.windows(64).position(|bytes| *bytes == block[..64]);
    at.unwrap()
}

#[test]
fn a_wrong_byte_on_the_disk_is_a_miss_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let store = DiskStore::open(&config(dir.path(), SMALL)).unwrap();
    for n in 0..3 {
        put(&store, "a", n);
    }
    drop(store);
    let whole = fs::read(&path).unwrap();
    let at = find(&whole, &bytes("a", 1)) + 4_321;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[whole[at] ^ 1], at as u64).unwrap();
    // The twin: the byte lies in what a read without the check would give out.
    let start = find(&whole, &bytes("a", 1));
    let raw = &fs::read(&path).unwrap()[start..start + 8_000];
    assert!(raw != bytes("a", 1) && raw[..4_321] == bytes("a", 1)[..4_321]);
    let store = DiskStore::open(&config(dir.path(), SMALL)).unwrap();
    assert!(has(&store, "a", 0) && !has(&store, "a", 1) && has(&store, "a", 2));
    let stats = store.stats();
    assert_eq!((stats.corrupt_blocks, stats.blocks), (1, 2));
    let news = store.news();
    assert_eq!(news["a"].dropped, [hash(1)]);
    // And it can be kept anew.
    assert_eq!(put(&store, "a", 1), Put::Stored);
    assert!(has(&store, "a", 1));
}

/// Which of the blocks come when all are asked for at once. Their bytes must be right.
fn read_at_once(store: &DiskStore, namespace: &str, numbers: &[u32]) -> Vec<u32> {
    let hashes: Vec<BlockHash> = numbers.iter().map(|n| hash(*n)).collect();
    let came = Mutex::new(Vec::new());
    store.get_all(namespace, &hashes, &|index, read| {
        let n = numbers[index];
        assert!(
            *read == bytes(namespace, n),
            "wrong bytes of {namespace} {n}"
        );
        came.lock().push(n);
    });
    let mut came = came.into_inner();
    came.sort_unstable();
    came
}

#[test]
fn of_blocks_that_are_read_at_once_only_what_is_wrong_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let store = DiskStore::open(&config(dir.path(), SMALL)).unwrap();
    for n in 0..10 {
        put(&store, "a", n);
    }
    let asked: Vec<u32> = (0..13).collect();
    assert_eq!(read_at_once(&store, "a", &asked), &asked[..10]);
    let twice = [3, 2, 2, 9, 0];
    assert_eq!(read_at_once(&store, "a", &twice), [0, 2, 2, 3, 9]);
    let whole = fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let at = find(&whole, &bytes("a", 4));
    file.write_all_at(&[whole[at] ^ 1], at as u64).unwrap();
    // What lies behind cannot be read.
    file.set_len(find(&whole, &bytes("a", 8)) as u64).unwrap();
    assert_eq!(read_at_once(&store, "a", &asked), [0, 1, 2, 3, 5, 6, 7]);
    let stats = store.stats();
    assert_eq!((stats.corrupt_blocks, stats.failed_blocks), (1, 2));
    assert_eq!(stats.blocks, 7);
    let mut dropped = store.news().remove("a").unwrap().dropped;
    dropped.sort_unstable();
    assert_eq!(dropped, [hash(4), hash(8), hash(9)]);
}

#[test]
fn a_file_of_another_kind_tenant_or_version_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let refused = |config: &StoreConfig| DiskStore::open(config).unwrap_err().to_string();
    fs::write(&path, vec![1; 10_000]).unwrap();
    let said = refused(&config(dir.path(), SMALL));
    assert!(said.contains("not a file of SwiftCache"), "{said}");
    assert_eq!(fs::read(&path).unwrap(), vec![1; 10_000]);
    fs::remove_file(&path).unwrap();
    drop(DiskStore::open(&config(dir.path(), SMALL)).unwrap());
    let other = StoreConfig {
        tenant: "1000/other".to_owned(),
        ..config(dir.path(), SMALL)
    };
    let said = refused(&other);
    assert!(said.contains("tenant"), "{said}");
    // As a later program would write it.
    let mut page = fs::read(&path).unwrap()[..PAGE as usize].to_vec();
    page[8] += 1;
    let end = PAGE as usize - 8;
    let sum = format::checksum(&page[..end], 0);
    page[end..].copy_from_slice(&sum.to_le_bytes());
    fs::write(&path, &page).unwrap();
    let said = refused(&config(dir.path(), SMALL));
    assert!(said.contains("layout version 2"), "{said}");
    // A first page that is damaged is no reason to refuse: nothing can be read by it.
    page[100] ^= 1;
    fs::write(&path, &page).unwrap();
    let store = DiskStore::open(&config(dir.path(), SMALL)).unwrap();
    assert_eq!(store.stats().blocks, 0);
    assert_eq!(put(&store, "a", 1), Put::Stored);
    drop(store);
    let said = refused(&config(dir.path(), 1_000));
    assert!(said.contains("bytes"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_written_restarted_cut_off_and_damaged_no_wrong_byte_comes_back(
        steps in prop::collection::vec((0_u8..10, 0_u8..2, 0_u32..40, any::<u32>()), 1..120),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut store = Some(DiskStore::open(&config(dir.path(), SMALL)).unwrap());
        let mut told: BTreeMap<String, BTreeSet<BlockHash>> = BTreeMap::new();
        for (step, which, n, at) in steps {
            let namespace = ["a", "bb"][usize::from(which)];
            let open = store.as_ref().unwrap();
            match step {
                0..=4 => { put(open, namespace, n); }
                5 => { has(open, namespace, n); }
                6 => {
                    let asked: Vec<u32> = (n..n + at % 40).collect();
                    let came = read_at_once(open, namespace, &asked);
                    // Each that is there, once: also those that are told of.
                    let there: Vec<u32> = asked.into_iter().filter(|n| has(open, namespace, *n)).collect();
                    prop_assert_eq!(came, there);
                }
                7 => {
                    // What is told adds up to what is there.
                    for (namespace, news) in open.news() {
                        let known = told.entry(namespace.to_string()).or_default();
                        news.dropped.iter().for_each(|hash| { known.remove(hash); });
                        known.extend(news.stored);
                    }
                    for (namespace, hashes) in open.all() {
                        let known = told.remove(&*namespace).unwrap_or_default();
                        prop_assert_eq!(&known, &hashes.iter().copied().collect());
                        told.insert(namespace.to_string(), known);
                    }
                }
                _ => {
                    drop(store.take());
                    let len = fs::metadata(&path).unwrap().len();
                    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
                    // The first page says whether it is a file of ours, and the program refuses it when not.
                    let at = 8 + u64::from(at) % (len - 8);
                    match step {
                        8 => {
                            let mut byte = [0];
                            file.read_exact_at(&mut byte, at).unwrap();
                            file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
                        }
                        _ => file.set_len(at.max(PAGE)).unwrap(),
                    }
                    let open = DiskStore::open(&config(dir.path(), SMALL)).unwrap();
                    told = open.all().into_iter().map(|(name, its)| (name.to_string(), its.into_iter().collect())).collect();
                    store = Some(open);
                }
            }
        }
        let open = store.as_ref().unwrap();
        for n in 0..40 {
            has(open, "a", n);
            has(open, "bb", n);
        }
        let stats = open.stats();
        prop_assert!(stats.used_bytes <= SMALL);
    }
}
