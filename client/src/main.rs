//! The swiftcache command: see [`swiftcache_client::cli`].

fn main() -> std::process::ExitCode {
    swiftcache_client::cli::main()
}
