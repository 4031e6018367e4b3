//! CUDA graphs of the engine: work that is captured once and launched many times.

use anyhow::Result;

use super::{Call, Engine, EngineStream, check};

/// `CU_STREAM_CAPTURE_MODE_GLOBAL`: the mode in which vLLM captures.
const GLOBAL: u32 = 0;

/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: a mode that a thread has only if it asks for it.
pub const THREAD_LOCAL: u32 = 1;

/// Captured work that can be launched. The engine never destroys it.
#[derive(Clone, Copy, Debug)]
pub struct Graph(usize);

impl Engine {
    /// Begins to capture the work that this thread queues on `stream`. In this mode, no other thread may make a call
    /// that might wait or allocate.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn begin_capture(&self, stream: EngineStream) -> Result<()> {
        // SAFETY: the signature is the driver's, and the stream is the engine's.
        unsafe {
            let begin: unsafe extern "C" fn(usize, u32) -> u32 =
                self.find("cuStreamBeginCapture_v2")?;
            check(begin(stream.0, GLOBAL), "cuStreamBeginCapture")
        }
    }

    /// Changes the capture mode of this thread. Returns the mode that it had.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn exchange_capture_mode(&self, mode: u32) -> Result<u32> {
        let mut mode = mode;
        // SAFETY: the signature is the driver's; one mode is read from and written to one of ours.
        unsafe {
            let exchange: Call<*mut u32> = self.find("cuThreadExchangeStreamCaptureMode")?;
            let code = exchange(&raw mut mode);
            check(code, "cuThreadExchangeStreamCaptureMode")?;
        }
        Ok(mode)
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// When a call has spoiled the capture, so that there is no graph.
    pub fn end_capture(&self, stream: EngineStream) -> Result<Graph> {
        let (mut graph, mut executable) = (0, 0);
        // SAFETY: the signatures are the driver's; a graph and an executable graph are written, each to one of ours.
        unsafe {
            let end: unsafe extern "C" fn(usize, *mut usize) -> u32 =
                self.find("cuStreamEndCapture")?;
            check(end(stream.0, &raw mut graph), "cuStreamEndCapture")?;
            let instantiate: unsafe extern "C" fn(*mut usize, usize, u64) -> u32 =
                self.find("cuGraphInstantiateWithFlags")?;
            let code = instantiate(&raw mut executable, graph, 0);
            check(code, "cuGraphInstantiate")?;
            let destroy: Call<usize> = self.find("cuGraphDestroy")?;
            check(destroy(graph), "cuGraphDestroy")?;
        }
        Ok(Graph(executable))
    }

    /// Queues the captured work.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn launch(&self, graph: Graph, stream: EngineStream) -> Result<()> {
        // SAFETY: the signature is the driver's, and graph and stream are the engine's.
        unsafe {
            let launch: unsafe extern "C" fn(usize, usize) -> u32 = self.find("cuGraphLaunch")?;
            check(launch(graph.0, stream.0), "cuGraphLaunch")
        }
    }
}
