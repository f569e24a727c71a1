// Greedy tokens of a GGUF file by llama.cpp: node llama.mjs FILE TOKENS TEXT COUNT [ADAPTER], run where the package is.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
const found = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found));
const [file, tokens, text, count, adapter] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const lora = adapter ? {lora: {adapters: [{filePath: adapter}]}} : {};
const context = await model.createContext({contextSize: 256, threads: 1, ...lora});
const answer = [];
const choices = context.getSequence().evaluateWithMetadata(
  JSON.parse(tokens), {probabilities: true}, {temperature: 0, yieldEogToken: true},
);
for await (const {token, probabilities} of choices) {
  const [first, second] = [...probabilities.values()];
  answer.push([Number(token), first, second]);
  if (answer.length >= Number(count)) break;
}
console.log(JSON.stringify({answer, tokens: model.tokenize(text, false).map(Number)}));
process.exit(0);
