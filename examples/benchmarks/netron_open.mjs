// Opens files with netron's own parser and prints what it would show, as JSON.
// node netron_open.mjs FOLDER_OF_NETRON FILE...
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as url from 'node:url';

const [folder, ...files] = process.argv.slice(2);
const load = (name) => import(url.pathToFileURL(path.join(folder, name)).href);
const view = await load('view.js');
const node = await load('node.js');

class Host {
    constructor() { this.errors = []; }
    get environment() { return () => null; }
    async require(id) { return load(`${id.replace('./', '')}.js`); }
    async request(file, encoding) { return fs.promises.readFile(path.join(folder, file), encoding); }
    exception(error) { this.errors.push(error.message); }
    event() {}
    worker() { return null; }
}

const found = {};
for (const file of files) {
    const host = new Host();
    const stream = new node.FileStream(file, 0, fs.statSync(file).size, fs.statSync(file).mtimeMs);
    const context = {
        identifier: path.basename(file), stream, entries: new Map(), host,
        request: (name, encoding) => host.request(name, encoding),
        fetch: async () => { throw new Error('no other file is given'); },
        require: (id) => host.require(id),
        error: (error) => { throw error; },
    };
    const service = new view.ModelFactoryService(host);
    const model = await service.open(context);
    const graph = model.modules[0];
    const types = {};
    for (const item of graph.nodes) {
        types[item.type.name] = (types[item.type.name] || 0) + 1;
        for (const argument of [...item.inputs, ...item.outputs]) {
            for (const value of argument.value) {
                const tensor = value && value.initializer;
                if (tensor) { types[`: ${tensor.type}`.split('[')[0]] = (types[`: ${tensor.type}`.split('[')[0]] || 0) + 1; }
            }
        }
    }
    found[file] = { format: model.format, nodes: graph.nodes.length, inputs: graph.inputs.map((i) => i.name), outputs: graph.outputs.map((i) => i.name), types, errors: host.errors };
}
console.log(JSON.stringify(found));
