// llama.cpp behind HTTP: its own batching of sequences, one context per adapter, greedy answers.
//
//     node perf/serving_llama.mjs GGUF PORT THREADS SEQUENCES NAME=LORA_GGUF…
//
// Run by perf/serving_llama.py in an environment that has node-llama-cpp, which brings llama.cpp ready built.

import { createServer } from "node:http";
import { getLlama } from "node-llama-cpp";

const [gguf, port, threads, sequences, ...adapters] = process.argv.slice(2);
const SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
const TOKENS_OF_A_SEQUENCE = 512;

const llama = await getLlama({ gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error" });
const model = await llama.loadModel({ modelPath: gguf, gpuLayers: 0 });
const contexts = new Map();
for (const adapter of adapters) {
  const [name, filePath] = adapter.split("=");
  contexts.set(name, await model.createContext({
    sequences: Number(sequences), contextSize: TOKENS_OF_A_SEQUENCE, threads: Number(threads),
    lora: { adapters: [{ filePath }] },
  }));
}

async function answer({ model: name, messages, max_tokens: most }) {
  const turns = [{ role: "system", content: SYSTEM }, ...messages];
  const said = turns.map(({ role, content }) => `<|im_start|>${role}\n${content}<|im_end|>\n`).join("");
  const prompt = model.tokenize(`${said}<|im_start|>assistant\n`, true);
  const sequence = contexts.get(name).getSequence();
  const tokens = [];
  try {
    for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
      if (model.isEogToken(token)) break;
      tokens.push(token);
      if (tokens.length === most) break;
    }
  } finally {
    await sequence.clearHistory();
    sequence.dispose();
  }
  const content = model.detokenize(tokens, false);
  return { choices: [{ message: { content } }], usage: { completion_tokens: tokens.length } };
}

createServer(async (request, response) => {
  if (request.method === "GET") return void response.end('{"status": "ok"}');
  const parts = [];
  for await (const part of request) parts.push(part);
  try {
    const found = JSON.stringify(await answer(JSON.parse(Buffer.concat(parts))));
    response.setHeader("content-type", "application/json").end(found);
  } catch (error) {
    response.writeHead(500).end(JSON.stringify({ error: String(error) }));
  }
}).listen(Number(port), "127.0.0.1");
